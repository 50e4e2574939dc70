import pytest


@pytest.fixture
def apples(pgmonkey):
    pgmonkey.execute("INSERT INTO product (name, stock) VALUES ('apple', 5)")


def test_a_new_shop_is_empty(client):
    assert client.get("/products").json == []


def test_a_product_is_added(client):
    response = client.post("/products", json={"name": "pear", "stock": 3})
    assert response.status_code == 201
    assert client.get("/products").json == [{"name": "pear", "stock": 3}]


def test_a_name_is_taken_once(client, apples):
    assert client.post("/products", json={"name": "apple", "stock": 1}).status_code == 409
    assert client.get("/products").json == [{"name": "apple", "stock": 5}]


def test_a_sale_takes_from_the_stock(client, apples):
    response = client.post("/products/apple/sales", json={"quantity": 2})
    assert response.json == {"left": 3}


def test_a_sale_of_too_many_leaves_no_trace(client, apples, pgmonkey):
    assert client.post("/products/apple/sales", json={"quantity": 6}).status_code == 409
    assert pgmonkey.execute("SELECT count(*) FROM sale").fetchone() == (0,)
    assert client.get("/products").json == [{"name": "apple", "stock": 5}]


def test_what_is_not_there_is_not_sold(client):
    assert client.post("/products/plum/sales", json={"quantity": 1}).status_code == 404
