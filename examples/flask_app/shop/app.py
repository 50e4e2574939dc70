"""The shop's routes. Its pool is opened once, when this module is imported."""

from __future__ import annotations

from pathlib import Path

import psycopg
from flask import Flask, abort, request
from psycopg.rows import dict_row

from pytest_pgmonkey import PGConnectionManager

app = Flask(__name__)
manager = PGConnectionManager()
db = manager.get_database_connection(Path(__file__).with_name("database.yaml"), "pool")


@app.get("/products")
def products():
    with db as conn:
        cursor = conn.cursor(row_factory=dict_row)
        return cursor.execute("SELECT name, stock FROM product ORDER BY name").fetchall()


@app.post("/products")
def add_product():
    product = request.get_json()
    try:
        with db as conn:
            conn.execute("INSERT INTO product (name, stock) VALUES (%(name)s, %(stock)s)", product)
    except psycopg.errors.UniqueViolation:
        abort(409)
    return product, 201


@app.post("/products/<name>/sales")
def sell(name: str):
    quantity = request.get_json()["quantity"]
    try:
        return {"left": _sell(name, quantity)}, 201
    except psycopg.errors.CheckViolation:
        abort(409)


def _sell(name: str, quantity: int) -> int:
    """Note the sale and take it from the stock: both, or neither."""
    with db.transaction() as conn:
        row = conn.execute("SELECT id FROM product WHERE name = %s", [name]).fetchone()
        if row is None:
            abort(404)
        conn.execute("INSERT INTO sale (product_id, quantity) VALUES (%s, %s)", [row[0], quantity])
        (left,) = conn.execute(
            "UPDATE product SET stock = stock - %s WHERE id = %s RETURNING stock",
            [quantity, row[0]],
        ).fetchone()
    return left
