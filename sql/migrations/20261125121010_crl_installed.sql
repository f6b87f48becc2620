-- migrate:up

-- The serial numbers on the current list of each authority, and the number of the first list with each.
create table crl_listed (
  issuer text not null, -- subject of the authority, RFC 4514
  serial text not null,
  number numeric(48) not null,
  primary key (issuer, serial)
);

-- Which list each node's host has installed, as its `crl sync` reports.
create table crl_installed (
  node text not null, -- as RabbitMQ calls it: rabbit@HOST
  issuer text not null, -- subject of the authority, RFC 4514
  number numeric(48) not null,
  next_update timestamptz not null,
  reported_at timestamptz not null default clock_timestamp(),
  primary key (node, issuer),
  constraint crl_installed_node check (case when node ~ '^[^@[:space:]]{1,200}@[^@[:space:]]{1,255}$' then true else public.refuse(format('node %L: a node is written as RabbitMQ does, rabbit@HOST', left(node, 80))) end),
  constraint crl_installed_number check (case when number between 0 and 1e30 then true else public.refuse(format('list of %L on node %s: a number from 0 to 10^30 can be reported', issuer, node)) end)
);

create function crl_report(node text, issuer text, number numeric, next_update timestamptz) returns void
language sql security definer set search_path = pg_catalog, pg_temp as $$
  insert into public.crl_installed (node, issuer, number, next_update) values ($1, $2, $3, $4)
  on conflict on constraint crl_installed_pkey do update
  set number = excluded.number, next_update = excluded.next_update, reported_at = excluded.reported_at
$$;
revoke execute on function crl_report(text, text, numeric, timestamptz) from public;

-- migrate:down
