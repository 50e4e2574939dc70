"""The views."""

from __future__ import annotations

from django.http import HttpRequest, JsonResponse
from django.shortcuts import get_object_or_404
from django.views.decorators.http import require_GET, require_POST

from .models import Show
from .sales import SoldOutError, sell


@require_GET
def shows(request: HttpRequest) -> JsonResponse:
    return JsonResponse({show.title: show.seats for show in Show.objects.order_by("title")})


@require_POST
def buy(request: HttpRequest, title: str) -> JsonResponse:
    get_object_or_404(Show, title=title)
    try:
        ticket = sell(title, request.POST["email"])
    except SoldOutError:
        return JsonResponse({"error": "sold out"}, status=409)
    return JsonResponse({"left": ticket.show.seats}, status=201)
