-- migrate:up

-- The oldest version of authbackend that decides rightly by this schema. A migration that older programs would misread
-- (a new status, a condition on who is active, a rule of another table) replaces the function; one that only adds what
-- they may leave aside does not. Older programs stop following, say why, and deny everybody when their copy is stale.
create function registry_oldest_program() returns text
language sql stable set search_path = pg_catalog, pg_temp as $$ select '0.1.0' $$;

-- migrate:down
