-- migrate:up

-- Deleting a device revokes its certificates for good, in the same transaction: otherwise they would be good to log in as
-- a device that is registered under the same name later.

-- ON DELETE SET NULL would unlink the certificates before a statement trigger could see which device they belonged to. So
-- triggers do it, and the constraint is checked after them.
alter table certificate drop constraint certificate_device_id_fkey,
  add constraint certificate_device_id_fkey foreign key (device_id) references device (device_id) on update cascade deferrable initially immediate;

create function device_certificates_revoke() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if tg_when = 'BEFORE' then
    set constraints public.certificate_device_id_fkey deferred;
    return null;
  end if;
  update public.certificate c set device_id = null, state = 'revoked', reason = case c.state when 'active' then 'cessationOfOperation' else c.reason end
  from old_rows o where c.device_id = o.device_id;
  -- Put on record before the device was registered, and never given to it: it could log in with them all the same.
  update public.certificate c set state = 'revoked', reason = 'cessationOfOperation'
  from old_rows o where c.device_id is null and c.state = 'active' and c.common_name = o.common_name;
  set constraints public.certificate_device_id_fkey immediate;
  return null;
end $$;
create trigger certificates_defer before delete on device for each statement execute function device_certificates_revoke();
create trigger certificates_revoke after delete on device referencing old table as old_rows for each statement execute function device_certificates_revoke();
revoke execute on function device_certificates_revoke() from public;

create function device_truncate() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if exists (select from public.certificate where device_id is not null and state = 'active' and not_after > now()) then
    perform public.refuse('TRUNCATE would empty the table of certificates too, and some of devices are valid: DELETE the devices instead, which revokes their certificates');
  end if;
  return null;
end $$;
create trigger device_truncate before truncate on device for each statement execute function device_truncate();
revoke execute on function device_truncate() from public;

alter table device enable always trigger certificates_defer, enable always trigger certificates_revoke, enable always trigger device_truncate;

-- The planner underestimates the transition tables of a mass change; a nested loop over 100,000 rows took minutes.
alter function enforcement_certificate() set enable_nestloop = off;

-- For brokers that do not show serial numbers, a sweep looks certificates up by common name.
create index certificate_revoked_name on certificate (common_name) where state = 'revoked';

-- migrate:down
