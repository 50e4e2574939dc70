import asyncio

import pytest_asyncio

BLUE = "/rooms/blue/nights"


@pytest_asyncio.fixture
async def blue_room(client):
    """A room, added as anybody would add it; after the test it is gone."""
    assert (await client.post("/rooms", json={"name": "blue"})).status_code == 201


async def test_a_new_house_has_no_rooms(client):
    assert (await client.get("/rooms")).json() == []


async def test_a_room_is_added(client):
    assert (await client.post("/rooms", json={"name": "red"})).status_code == 201
    assert (await client.get("/rooms")).json() == ["red"]


async def test_a_name_is_given_once(client, blue_room):
    assert (await client.post("/rooms", json={"name": "blue"})).status_code == 409
    assert (await client.get("/rooms")).json() == ["blue"]


async def test_nights_are_booked(client, blue_room):
    ann = {"guest": "Ann", "days": ["2030-05-01", "2030-05-02"]}
    assert (await client.post(BLUE, json=ann)).status_code == 201
    assert (await client.get(BLUE)).json() == {"2030-05-01": "Ann", "2030-05-02": "Ann"}


async def test_one_taken_night_refuses_all(client, blue_room):
    ann = {"guest": "Ann", "days": ["2030-05-02"]}
    ben = {"guest": "Ben", "days": ["2030-05-01", "2030-05-02"]}
    assert (await client.post(BLUE, json=ann)).status_code == 201
    assert (await client.post(BLUE, json=ben)).status_code == 409
    assert (await client.get(BLUE)).json() == {"2030-05-02": "Ann"}


async def test_one_of_many_guests_at_the_same_time_gets_the_room(client, blue_room):
    wishes = [{"guest": guest, "days": ["2030-05-01"]} for guest in ("Ann", "Ben", "Cleo", "Dan")]
    answers = await asyncio.gather(*[client.post(BLUE, json=wish) for wish in wishes])
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409]
    assert len((await client.get(BLUE)).json()) == 1


async def test_a_room_that_is_not_there(client):
    ann = {"guest": "Ann", "days": ["2030-05-01"]}
    assert (await client.post(BLUE, json=ann)).status_code == 404


async def test_the_rows_of_a_booking(client, blue_room, pgmonkey):
    await client.post(BLUE, json={"guest": "Ann", "days": ["2030-05-01"]})
    query = "SELECT name, guest, day::text FROM night JOIN room ON room.id = room_id"
    assert pgmonkey.execute(query).fetchall() == [("blue", "Ann", "2030-05-01")]


async def test_rows_from_elsewhere(client, blue_room, pgmonkey):
    pgmonkey.execute(
        "INSERT INTO night (room_id, day, guest) SELECT id, '2030-05-01', 'Ann' FROM room"
    )
    assert (await client.get(BLUE)).json() == {"2030-05-01": "Ann"}
