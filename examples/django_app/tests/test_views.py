import json
from urllib.request import urlopen

from django.test import TestCase, TransactionTestCase
from tickets import mailing
from tickets.models import Show, Ticket

ANN = {"email": "ann@example.com"}


class TestShows(TestCase):
    @classmethod
    def setUpTestData(cls):
        cls.hamlet = Show.objects.create(title="Hamlet", seats=1)
        Show.objects.create(title="Faust", seats=3)

    def test_all_are_listed(self):
        assert self.client.get("/shows").json() == {"Faust": 3, "Hamlet": 1}

    def test_a_ticket_is_bought(self):
        response = self.client.post("/shows/Hamlet/tickets", ANN)
        assert (response.status_code, response.json()) == (201, {"left": 0})
        self.hamlet.refresh_from_db()
        assert self.hamlet.seats == 0

    def test_a_show_is_sold_out(self):
        self.client.post("/shows/Hamlet/tickets", ANN)
        assert self.client.post("/shows/Hamlet/tickets", ANN).status_code == 409
        assert Ticket.objects.count() == 1


class TestNoShows(TestCase):
    def test_none_is_listed(self):
        assert self.client.get("/shows").json() == {}

    def test_no_ticket_is_sold(self):
        assert self.client.post("/shows/Hamlet/tickets", ANN).status_code == 404


class TestCommits(TransactionTestCase):
    def test_a_ticket_is_bought(self):
        Show.objects.create(title="Hamlet", seats=1)
        assert self.client.post("/shows/Hamlet/tickets", ANN).status_code == 201
        mailing.wait()
        assert Ticket.objects.get().mailed

    def test_nothing_is_left_of_another_test(self):
        assert not Show.objects.exists()


def test_a_browser_sees_what_the_test_has_written(live_server):
    Show.objects.create(title="Hamlet", seats=1)
    with urlopen(f"{live_server}/shows") as response:
        assert json.load(response) == {"Hamlet": 1}
