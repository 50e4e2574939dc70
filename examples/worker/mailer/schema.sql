CREATE TYPE mail_state AS ENUM ('waiting', 'sent', 'failed');

CREATE TABLE mail (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    recipient text NOT NULL,
    state mail_state NOT NULL DEFAULT 'waiting',
    problem text
);
