-- migrate:up

-- Certificates on record, the authorities that issue them, and each authority's revocation list. Not part of the copy
-- that decides requests: no change feed here. Private keys are never in the database.

-- What is wrong with a serial number as lower-case hexadecimal digits, or null. RFC 5280 4.1.2.2: at most 20 octets.
create function certificate_serial_fault(serial text) returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp as $$
  select case
    when serial is null or serial !~ '^[0-9a-f]{1,40}$' then 'it is written as 1 to 40 lower-case hexadecimal digits without separators'
    when serial ~ '^[89a-f].{39}$' then 'it has more than 20 octets, because as a DER integer it begins with a zero one'
    when serial ~ '^0' then 'it is written without leading zeros, and zero is not possible'
  end
$$;

create table certificate (
  fingerprint text primary key, -- SHA-256 of the DER form
  serial text not null,
  issuer text not null, -- RFC 4514
  subject text not null, -- RFC 4514
  common_name text not null, -- as RabbitMQ reads it: several are joined with a comma
  not_before timestamptz not null,
  not_after timestamptz not null,
  device_id text references device (device_id) on update cascade on delete set null, -- null: no registered device
  state text not null default 'active',
  reason text not null default '', -- a reason name of RFC 5280 5.3.1, or free text, which is listed as unspecified
  revoked_at timestamptz,
  added_at timestamptz not null default now(),
  constraint certificate_issuer_serial unique (issuer, serial),
  constraint certificate_fingerprint check (case when fingerprint ~ '^[0-9a-f]{64}$' then true else public.refuse(format('fingerprint %L: it is the SHA-256 of the certificate as 64 lower-case hexadecimal digits', left(fingerprint, 80))) end),
  constraint certificate_serial check (case when public.certificate_serial_fault(serial) is null then true else public.refuse(format('serial number %L: %s', left(serial, 80), public.certificate_serial_fault(serial))) end),
  constraint certificate_names check (case when issuer <> '' and octet_length(issuer) <= 2048 and octet_length(subject) <= 2048 and octet_length(common_name) <= 1024 then true else public.refuse(format('certificate %s: issuer (not empty) and subject have at most 2048 bytes, the common name at most 1024', serial)) end),
  constraint certificate_validity check (case when not_before >= '1950-01-01Z' and not_after < '10000-01-01Z' and not_before <= not_after then true else public.refuse(format('certificate %s: its validity must begin before it ends, in the years 1950 to 9999', serial)) end),
  constraint certificate_state check (case when state in ('active', 'revoked') then true else public.refuse(format('state %L of certificate %s: possible are active and revoked', state, serial)) end),
  constraint certificate_reason check (case when reason in ('certificateHold', 'removeFromCRL') then public.refuse(format('reason %L of certificate %s: a revocation is final here; to deny a device for now, suspend the device', reason, serial)) when octet_length(reason) > 1024 then public.refuse(format('reason of certificate %s: at most 1024 bytes are possible', serial)) else true end),
  constraint certificate_revoked_at check (case when (state = 'revoked') = (revoked_at is not null) then true else public.refuse(format('certificate %s: revoked_at goes with the state revoked', serial)) end),
  constraint certificate_revoked_at_range check (case when revoked_at is null or (revoked_at >= '1950-01-01Z' and revoked_at < '10000-01-01Z') then true else public.refuse(format('certificate %s: revoked_at is in the years 1950 to 9999', serial)) end)
);
create index certificate_serial on certificate (serial);
create index certificate_device_id on certificate (device_id, not_after);
create index certificate_not_after on certificate (not_after);
create index certificate_common_name on certificate (common_name) where device_id is null;
create index certificate_revoked on certificate (issuer) where state = 'revoked';

create function certificate_check() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if tg_op = 'DELETE' then
    if old.state = 'revoked' and old.not_after > now() then
      perform public.refuse(format('certificate %s of %L is revoked and not expired: without its row it would be missing from the revocation list', old.serial, old.common_name));
    end if;
    return old;
  end if;
  if tg_op = 'UPDATE' then
    if (new.fingerprint, new.serial, new.issuer, new.not_after) is distinct from (old.fingerprint, old.serial, old.issuer, old.not_after) then
      perform public.refuse(format('certificate %s: fingerprint, serial number, issuer and end of validity cannot be changed; a new certificate is a new row', old.serial));
    end if;
    if old.state = 'revoked' and new.state is distinct from 'revoked' then
      perform public.refuse(format('certificate %s of %L is revoked for good; issue a new one', old.serial, old.common_name));
    end if;
  elsif new.device_id is null then
    select device_id into new.device_id from public.device where common_name = new.common_name;
  end if;
  if new.state = 'revoked' and new.revoked_at is null then
    new.revoked_at := now();
  end if;
  return new;
end $$;
create trigger certificate_check before insert or update or delete on certificate for each row execute function certificate_check();

create function certificate_truncate() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if exists (select from public.certificate where state = 'revoked' and not_after > now()) then
    perform public.refuse('TRUNCATE would empty the table of certificates too, and some are revoked and not expired: without their rows they would be missing from the revocation list');
  end if;
  return null;
end $$;
create trigger certificate_truncate before truncate on certificate for each statement execute function certificate_truncate();

create table authority (
  name text primary key, -- in the URL of its list: /crl/NAME.crl
  subject text not null unique, -- RFC 4514: the issuer of its certificates
  certificate_pem text not null,
  not_after timestamptz not null,
  added_at timestamptz not null default now(),
  constraint authority_name check (case when name ~ '^[A-Za-z0-9_-]{1,64}$' then true else public.refuse(format('authority %L: a name is 1 to 64 letters, digits, "_" and "-"', left(name, 80))) end),
  constraint authority_certificate_pem check (case when certificate_pem ~ '-----BEGIN CERTIFICATE-----' and certificate_pem !~ 'PRIVATE KEY' and octet_length(certificate_pem) <= 65536 then true else public.refuse(format('certificate of authority %L: it is one PEM certificate, and never a private key', name)) end)
);

-- The current list of each authority.
create table crl (
  authority text primary key references authority (name) on update cascade on delete cascade,
  number numeric(48) not null, -- RFC 5280 5.2.3: at most 20 octets, never lower than before
  this_update timestamptz not null,
  next_update timestamptz not null,
  der bytea not null,
  constraint crl_number check (case when number >= 0 then true else public.refuse(format('revocation list of authority %L: its number is 0 or more', authority)) end),
  constraint crl_next_update check (case when next_update > this_update then true else public.refuse(format('revocation list of authority %L: nextUpdate must be after thisUpdate', authority)) end)
);

create function crl_check() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if new.number < old.number then
    perform public.refuse(format('revocation list of authority %L: number %s is older than the present number %s', new.authority, new.number, old.number));
  elsif new.number = old.number and new.der <> old.der then
    perform public.refuse(format('revocation list of authority %L: there is another list with number %s', new.authority, new.number));
  end if;
  return new;
end $$;
create trigger crl_check before update on crl for each row execute function crl_check();

-- Notifies the channel that the argument names.
create function channel_notify() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  perform pg_notify(tg_argv[0], '');
  return null;
end $$;
create trigger changed after insert or update or delete or truncate on certificate for each statement execute function channel_notify('certificate');
create trigger changed after insert or update or delete or truncate on authority for each statement execute function channel_notify('crl');
create trigger changed after insert or update or delete or truncate on crl for each statement execute function channel_notify('crl');

-- As before; of a revocation list everything but the list itself, which can be megabytes.
create or replace function audit_row(entity text, r jsonb) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case
    when entity = 'account' and r is not null
      then r || jsonb_build_object('password_hash', case when r ->> 'password_hash' is null then null else 'set' end)
    when entity = 'crl' then r - 'der'
    else r end
$$;

call audit_watch('certificate', 'certificate', 'fingerprint');
call audit_watch('authority', 'authority', 'name');
call audit_watch('crl', 'crl', 'authority');

alter table certificate enable always trigger certificate_check, enable always trigger certificate_truncate, enable always trigger changed;
alter table authority enable always trigger changed;
alter table crl enable always trigger crl_check, enable always trigger changed;

-- migrate:down
