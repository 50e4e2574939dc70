import pytest
from django.core import mail
from tickets import mailing
from tickets.models import Show, Ticket
from tickets.sales import SoldOutError, sell, sell_all

pytestmark = pytest.mark.django_db


@pytest.fixture
def hamlet(db):
    return Show.objects.create(title="Hamlet", seats=2)


def test_a_new_office_has_no_shows():
    assert not Show.objects.exists()


def test_a_ticket_takes_a_seat(hamlet):
    sell("Hamlet", "ann@example.com")
    assert Show.objects.get().seats == 1
    assert Ticket.objects.get().email == "ann@example.com"


def test_the_last_seat_is_sold_once(hamlet):
    sell_all("Hamlet", ["ann@example.com", "ben@example.com"])
    with pytest.raises(SoldOutError):
        sell("Hamlet", "cleo@example.com")
    assert Ticket.objects.count() == 2


def test_a_group_gets_all_tickets_or_none(hamlet):
    with pytest.raises(SoldOutError):
        sell_all("Hamlet", ["ann@example.com", "ben@example.com", "cleo@example.com"])
    hamlet.refresh_from_db()
    assert (hamlet.seats, Ticket.objects.count()) == (2, 0)


def test_a_sale_takes_few_queries(hamlet, django_assert_num_queries):
    with django_assert_num_queries(5):  # a savepoint and its end among them
        sell("Hamlet", "ann@example.com")


def test_a_ticket_is_mailed_after_the_commit(hamlet, django_capture_on_commit_callbacks):
    with django_capture_on_commit_callbacks() as callbacks:
        sell("Hamlet", "ann@example.com")
    assert len(callbacks) == 1
    assert mail.outbox == []


@pytest.mark.django_db(transaction=True)
def test_the_mail_goes_out_from_another_thread(hamlet):
    sell_all("Hamlet", ["ann@example.com", "ben@example.com"])
    mailing.wait()
    assert sorted(mail.outbox[i].to[0] for i in (0, 1)) == ["ann@example.com", "ben@example.com"]
    assert Ticket.objects.filter(mailed=True).count() == 2


@pytest.mark.django_db(transaction=True)
def test_no_mail_for_a_group_without_tickets(hamlet):
    with pytest.raises(SoldOutError):
        sell_all("Hamlet", ["ann@example.com", "ben@example.com", "cleo@example.com"])
    mailing.wait()
    assert mail.outbox == []


@pytest.mark.django_db(transaction=True)
def test_rows_from_elsewhere(pgmonkey):
    pgmonkey.execute("INSERT INTO tickets_show (title, seats) VALUES ('Faust', 1)")
    sell("Faust", "ann@example.com")
    mailing.wait()
    assert pgmonkey.execute("SELECT seats FROM tickets_show").fetchone() == (0,)
