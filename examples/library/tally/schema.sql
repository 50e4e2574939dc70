CREATE TABLE IF NOT EXISTS tally (
    name text PRIMARY KEY,
    total bigint NOT NULL DEFAULT 0 CHECK (total >= 0)
);
