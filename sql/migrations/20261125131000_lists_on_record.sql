-- migrate:up

-- What a receipt says depends on which certificates are on a list, so changes of that are in the audit trail.
call audit_watch('crl_listed', 'crl_listed', 'serial');

-- Deletes the reports of a node's host, so that no receipt waits for it. Returns how many lists it had reported.
create function crl_forget(which text) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  n bigint;
begin
  with gone as (delete from public.crl_installed where node = which returning *)
  insert into public.audit (operation, entity, key, before) select 'DELETE', 'crl_installed', node, to_jsonb(gone) from gone;
  get diagnostics n = row_count;
  return n;
end $$;
revoke execute on function crl_forget(text) from public;

-- migrate:down
