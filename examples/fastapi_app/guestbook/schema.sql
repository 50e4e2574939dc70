CREATE SCHEMA guestbook;

CREATE TABLE guestbook.entry (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    author text NOT NULL,
    message text NOT NULL
);
