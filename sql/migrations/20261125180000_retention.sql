-- migrate:up

-- The audit trail is append-only, except that audit_forget() can delete rows older than 90 days; it records that in the trail.
create or replace function audit_refuse() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if tg_op = 'DELETE' and current_setting('authbackend.forgetting', true) = pg_current_xact_id()::text then
    return null;
  end if;
  raise exception using errcode = 'insufficient_privilege', message = format('the audit trail is append-only: %s is refused', tg_op);
end $$;

-- Deletes up to `most` of the oldest rows and returns how many; call it again until that is 0. For the owner of the tables: no
-- other role may delete from the trail, and the function runs with the caller's privileges.
create function audit_forget(older_than interval, most bigint default 100000) returns bigint
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  gone record;
begin
  if older_than is null or older_than < interval '90 days' then
    perform public.refuse('the audit trail keeps the last 90 days at least. For example: select audit_forget(interval ''2 years'')');
  end if;
  perform set_config('authbackend.forgetting', pg_current_xact_id()::text, true);
  with deleted as (
    delete from public.audit where id in (
      select id from public.audit
      where id < coalesce((select a.id from public.audit a where a.at >= now() - older_than order by a.id limit 1), 9223372036854775807)
      order by id limit most)
    returning at)
  select count(*) as number, min(at) as first, max(at) as last into gone from deleted;
  perform set_config('authbackend.forgetting', '', true);
  if gone.number > 0 then
    insert into public.audit (operation, entity, before)
    values ('FORGET', 'audit', jsonb_build_object('rows', gone.number, 'from', gone.first, 'until', gone.last));
  end if;
  return gone.number;
end $$;
revoke execute on function audit_forget(interval, bigint) from public;

-- Deletes up to `most` certificates that expired long ago and returns how many, with an audit row for each. What is still needed
-- stays: the last certificate of each device, and compromised keys, which enrolment must not accept again.
create function certificate_forget(older_than interval, most bigint default 100000) returns bigint
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  n bigint;
begin
  if older_than is null or older_than < interval '400 days' then
    perform public.refuse('certificates stay on record for 400 days after their end at least: a revocation list names them for up to a year. For example: select certificate_forget(interval ''2 years'')');
  end if;
  delete from public.certificate where fingerprint in (
    select c.fingerprint from public.certificate c
    where c.not_after < now() - older_than
      and not (c.state = 'revoked' and c.reason = 'keyCompromise' and c.key_fingerprint is not null)
      and (c.device_id is null or exists (select from public.certificate s where s.device_id = c.device_id and s.not_after > c.not_after))
    order by c.not_after limit most);
  get diagnostics n = row_count;
  return n;
end $$;
revoke execute on function certificate_forget(interval, bigint) from public;

-- As before, but a host of a broker cannot fill the table with invented names.
create or replace function crl_report(node text, issuer text, number numeric, next_update timestamptz, counts_s double precision default 220) returns void
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
  if issuer is null or octet_length(issuer) > 2048 then
    perform public.refuse(format('the issuer of a list that node %L reports: it has at most 2048 bytes', left($1, 80)));
  elsif (select count(*) from public.crl_installed) >= 10000
      and not exists (select from public.crl_installed i where i.node = $1 and i.issuer = $2) then
    perform public.refuse(format('node %L cannot report a list: 10000 are reported by others; forget those that are gone: authbackend crl hosts --forget NODE', left($1, 80)));
  end if;
  insert into public.crl_installed (node, issuer, number, next_update, counts_until)
  values ($1, $2, $3, $4, clock_timestamp() + make_interval(secs => $5))
  on conflict on constraint crl_installed_pkey do update
  set number = excluded.number, next_update = excluded.next_update, reported_at = excluded.reported_at, counts_until = excluded.counts_until;
end $$;

-- As before, and also deletes the report of its last sweep.
create or replace function enforcement_cluster_forget(cluster_name text, out clusters bigint, out tasks bigint)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  delete from public.enforcement_cluster where name = cluster_name;
  get diagnostics clusters = row_count;
  delete from public.enforcement_sweep where cluster = cluster_name;
  with seen as (
    select * from public.enforcement where cluster = cluster_name and finished_at is null order by id for update),
  closed as (
    update public.enforcement e set state = 'superseded', finished_at = clock_timestamp(),
      receipt = coalesce(e.receipt, '{}') || '{"superseded": "the cluster was forgotten; what is connected there was not looked at again"}'
    from seen s where e.id = s.id returning e.id, to_jsonb(s) as before, to_jsonb(e) as after)
  insert into public.audit (operation, entity, key, before, after) select 'UPDATE', 'enforcement', id::text, before, after from closed;
  get diagnostics tasks = row_count;
end $$;

-- migrate:down
