-- migrate:up

-- With a revoked certificate, the next handshake fails by the revocation list; enforcement closes existing connections.

alter table enforcement drop constraint enforcement_kind_check;
alter table enforcement add constraint enforcement_kind_check check (kind in ('device', 'device_type', 'account', 'certificate'));

create function enforcement_certificate() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if not exists (select from public.enforcement_setup) then
    return null;
  end if;
  insert into public.enforcement (kind, name, causes, details)
  select 'certificate', n.serial, '{revoked}', jsonb_build_object('common_name', n.common_name)
  from old_rows o join new_rows n using (fingerprint) where o.state = 'active' and n.state = 'revoked' and n.not_after > now();
  perform pg_notify('enforcement', '');
  return null;
end $$;
create trigger enforcement_u after update on certificate referencing old table as old_rows new table as new_rows for each statement execute function enforcement_certificate();
alter table certificate enable always trigger enforcement_u;
revoke execute on function enforcement_certificate() from public;

-- For types whose brokers show serial numbers (RabbitMQ 4.2.7 and later): a sweep ends connections whose certificate is not on record.
alter table device_type add column require_known_certificate boolean not null default false;

-- migrate:down
