-- migrate:up

-- Who reports for a node: the authenticated role that reported first. A role reports for one node and a node is reported by one
-- role, so that the password of one host does not allow reports for another.
create table crl_reporter (
  node text primary key,
  role name not null unique,
  since timestamptz not null default clock_timestamp()
);
call audit_watch('crl_reporter', 'crl_reporter', 'node');

-- After this time it is unknown whether the host still has the list. -infinity: reported before this column existed.
alter table crl_installed add column counts_until timestamptz not null default '-infinity';
alter table crl_installed alter column counts_until drop default;

drop function crl_report(text, text, numeric, timestamptz);
-- counts_s: for how long the report is valid, several times the interval of reports. The default is for hosts with the previous version.
create function crl_report(node text, issuer text, number numeric, next_update timestamptz, counts_s double precision default 220) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  bound record;
begin
  if counts_s is null or not counts_s between 1 and 86400 then
    perform public.refuse(format('list of %L on node %s: a report counts for 1 second to a day', issuer, node));
  end if;
  insert into public.crl_reporter (node, role) values ($1, session_user) on conflict do nothing;
  select r.node, r.role into bound from public.crl_reporter r where r.node = $1 or r.role = session_user order by r.node = $1 desc limit 1;
  if bound.node <> $1 then
    perform public.refuse(format('role %s reports for node %s already, so it cannot report for node %s: give each node''s host a role of its own (create role NAME login in role authbackend_crl_sync)', session_user, bound.node, left($1, 80)));
  elsif bound.role <> session_user then
    perform public.refuse(format('node %s is reported by role %s, not by role %s; if that has changed: authbackend crl hosts --forget %s', $1, bound.role, session_user, $1));
  end if;
  insert into public.crl_installed (node, issuer, number, next_update, counts_until)
  values ($1, $2, $3, $4, clock_timestamp() + make_interval(secs => $5))
  on conflict on constraint crl_installed_pkey do update
  set number = excluded.number, next_update = excluded.next_update, reported_at = excluded.reported_at, counts_until = excluded.counts_until;
end $$;
revoke execute on function crl_report(text, text, numeric, timestamptz, double precision) from public;

-- Also deletes which role reported for it, so that another role can.
create or replace function crl_forget(which text) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  n bigint;
begin
  with gone as (delete from public.crl_installed where node = which returning *)
  insert into public.audit (operation, entity, key, before) select 'DELETE', 'crl_installed', node, to_jsonb(gone) from gone;
  get diagnostics n = row_count;
  delete from public.crl_reporter where node = which;
  return n;
end $$;

-- migrate:down
