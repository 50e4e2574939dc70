"""The routes."""

from django.urls import path
from tickets import views

urlpatterns = [
    path("shows", views.shows),
    path("shows/<str:title>/tickets", views.buy),
]
