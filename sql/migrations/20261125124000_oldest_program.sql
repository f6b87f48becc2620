-- migrate:up

-- The oldest version of authbackend that decides correctly with this schema. A migration that older programs would misread
-- (a new status, a condition on who is active, a rule in another table) replaces the function; one that only adds what
-- they may ignore does not. Older programs stop following, say why, and deny everybody when their copy is stale.
create function registry_oldest_program() returns text
language sql stable set search_path = pg_catalog, pg_temp as $$ select '0.1.0' $$;

-- migrate:down
