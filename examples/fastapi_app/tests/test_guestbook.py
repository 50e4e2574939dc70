import asyncio

ANN = {"author": "Ann", "message": "Lovely place"}
BEN = {"author": "Ben", "message": "Good soup"}


async def test_a_new_book_is_empty(client):
    assert (await client.get("/entries")).json() == []


async def test_an_entry_is_read_again(client):
    assert (await client.post("/entries", json=ANN)).status_code == 201
    assert (await client.get("/entries")).json() == [ANN]


async def test_a_sync_look_at_what_the_pool_wrote(client, pgmonkey):
    await client.post("/entries", json=ANN)
    row = pgmonkey.execute("SELECT author, message FROM guestbook.entry").fetchone()
    assert row == ("Ann", "Lovely place")


async def test_one_bad_entry_refuses_all(client):
    empty = {"author": "Ben", "message": " "}
    assert (await client.post("/entries/all", json=[ANN, empty])).status_code == 422
    assert (await client.get("/entries")).json() == []


async def test_requests_at_the_same_time(client):
    await asyncio.gather(*[client.post("/entries", json=entry) for entry in [ANN, BEN] * 5])
    assert (await client.get("/figures")).json() == {"authors": 2, "messages": 10}
