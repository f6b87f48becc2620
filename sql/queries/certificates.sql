-- Certificates, authorities and revocation lists.

-- name: insert_certificates
-- Certificates already on record are left unchanged.
-- params: 1 fingerprints, 2 serials, 3 issuers, 4 subjects, 5 common names, 6 starts and 7 ends of validity, 8 device ids
--   (null: the device with the common name), 9 states, 10 reasons, 11 times of revocation, 12 fingerprints of keys
-- row: fingerprint and device id of each inserted certificate
insert into certificate (fingerprint, serial, issuer, subject, common_name, not_before, not_after, device_id, state, reason, revoked_at, key_fingerprint)
select * from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::timestamptz[], $7::timestamptz[],
                     $8::text[], $9::text[], $10::text[], $11::timestamptz[], $12::text[])
on conflict do nothing
returning fingerprint, device_id;

-- name: compromised_keys
-- params: 1 fingerprints of keys
select key_fingerprint from certificate where key_fingerprint = any ($1::text[]) and state = 'revoked' and reason = 'keyCompromise';

-- name: present_fingerprints
-- params: 1 fingerprints
select fingerprint from certificate where fingerprint = any ($1::text[]);

-- name: link_devices$
-- A certificate recorded before its device was registered may have one now. Not a revoked one: it was of another device.
-- params: 1 fingerprints
with linked as (
  update certificate c set device_id = d.device_id from device d
  where c.fingerprint = any ($1::text[]) and c.device_id is null and c.state = 'active' and d.common_name = c.common_name
  returning 1)
select count(*) from linked;

-- name: certificates
-- params: 1 device id, 2 state, 3 expires between now and this interval from now, 4 limit, 5 fingerprint, 6 serial; null: any.
--   A row needs to match only one of 5 and 6.
select c.fingerprint, c.serial, c.issuer, c.subject, c.common_name, c.not_before, c.not_after, c.device_id, c.state,
       c.reason, c.revoked_at, c.added_at, d.type, d.status,
       exists (select from certificate s where s.device_id = c.device_id and s.state = 'active' and s.not_after > c.not_after) as renewed
from certificate c left join device d on d.device_id = c.device_id
where ($1::text is null or c.device_id = $1) and ($2::text is null or c.state = $2)
  and ($3::interval is null or c.not_after >= now() and c.not_after < now() + $3)
  and ($5::text is null and $6::text is null or c.fingerprint = $5 or c.serial = $6)
order by c.not_after, c.fingerprint limit $4;

-- name: expiring_by_day
-- Counts active certificates without a successor that expire within an interval from now, by day of expiry (UTC).
-- params: 1 interval
-- row: day, number
select (c.not_after at time zone 'UTC')::date as day, count(*) as number
from certificate c left join device d on d.device_id = c.device_id
where c.state = 'active' and c.not_after between now() and now() + $1::interval and coalesce(d.status, 'active') = 'active'
  and not exists (select from certificate s where s.device_id = c.device_id and s.state = 'active' and s.not_after > c.not_after)
  and not (c.device_id is null and exists (select from certificate s where s.device_id is null and s.common_name = c.common_name
           and s.state = 'active' and s.not_after > c.not_after))
group by 1 order by 1;

-- name: expiring_by_type
-- The same by device type; also how many have expired although their device is active.
-- row: type (unknown: of no device), days7, days30, days90, expired
select coalesce(d.type, 'unknown') as type,
       count(*) filter (where c.not_after >= now() and c.not_after < now() + interval '7 days') as days7,
       count(*) filter (where c.not_after >= now() and c.not_after < now() + interval '30 days') as days30,
       count(*) filter (where c.not_after >= now()) as days90,
       count(*) filter (where c.not_after < now() and d.device_id is not null) as expired
from certificate c left join device d on d.device_id = c.device_id
where c.state = 'active' and c.not_after < now() + interval '90 days' and coalesce(d.status, 'active') = 'active'
  and not exists (select from certificate s where s.device_id = c.device_id and s.state = 'active' and s.not_after > c.not_after)
  and not (c.device_id is null and exists (select from certificate s where s.device_id is null and s.common_name = c.common_name
           and s.state = 'active' and s.not_after > c.not_after))
group by 1;

-- name: revoke_certificates
-- params: 1 fingerprints, 2 reason
update certificate set state = 'revoked', reason = $2 where fingerprint = any ($1::text[]) and state = 'active'
returning fingerprint, serial, issuer, common_name, device_id;

-- name: revoke_listed
-- params: 1 issuer, 2 serials, 3 reasons, 4 times of revocation
-- row: serial of each that was active before
update certificate c set state = 'revoked', reason = l.reason, revoked_at = l.revoked_at
from unnest($2::text[], $3::text[], $4::timestamptz[]) as l (serial, reason, revoked_at)
where c.issuer = $1 and c.serial = l.serial and c.state = 'active'
returning c.serial;

-- name: known_serials$
-- params: 1 issuer, 2 serials
select count(*) from certificate where issuer = $1 and serial = any ($2::text[]);

-- name: save_authority!
-- params: 1 name, 2 subject, 3 certificate, 4 end of validity
insert into authority (name, subject, certificate_pem, not_after) values ($1, $2, $3, $4)
on conflict (name) do update set certificate_pem = excluded.certificate_pem, not_after = excluded.not_after
where authority.subject = excluded.subject and authority.certificate_pem <> excluded.certificate_pem;

-- name: authority_subject$
-- params: 1 name
select subject from authority where name = $1;

-- name: lock_list!
-- Only one process at a time signs the list of an authority.
-- params: 1 name
select pg_advisory_xact_lock(724003, hashtext($1));

-- name: signing^
-- params: 1 issuer
-- row: the time, the highest CRL number ever stored here, the highest one reported by hosts of brokers (null: none), and
--   how many certificates are recorded as listed
select clock_timestamp() as now, (select number::text from crl_highest where issuer = $1) as kept,
       (select max(number)::text from crl_installed where issuer = $1) as installed,
       (select count(*) from crl_listed where issuer = $1) as listed;

-- name: save_crl_entries!
-- params: 1 authority, 2 CRL number text, 3 serials on the list
with subject as (select subject as issuer from authority where name = $1),
     listed as (select issuer, serial from subject, unnest($3::text[]) as serial),
     gone as (delete from crl_listed c using subject s where c.issuer = s.issuer
              and not exists (select from listed l where l.serial = c.serial))
insert into crl_listed (issuer, serial, number) select issuer, serial, $2::text::numeric from listed on conflict do nothing;

-- name: report_list!
-- params: 1 node, 2 issuer, 3 CRL number text, 4 next update, 5 seconds for which the report is valid
select crl_report($1, $2, $3::text::numeric, $4, $5);

-- name: installed
-- row: node, role that reports for it, issuer, number, next_update, reported_at, and whether the report is still valid
select i.node, r.role::text as role, i.issuer, i.number::text as number, i.next_update, i.reported_at, i.counts_until > clock_timestamp() as counts
from crl_installed i left join crl_reporter r using (node) order by node, issuer;

-- name: forget_node$
-- params: 1 node
select crl_forget($1);

-- name: revoked
-- The revocations that belong on the list of an authority; uses the index certificate_revoked.
-- params: 1 issuer, 2 only certificates whose validity ends after this
select serial, reason, revoked_at from certificate
where issuer = $1 and state = 'revoked' and not_after > $2 order by revoked_at, serial;

-- name: lists
-- params: 1 authority (null: all), 2 AUTHORITY:NUMBER of the lists that the caller already has, returned without contents
select a.name, a.subject, a.certificate_pem, a.not_after, c.number::text as number, c.this_update, c.next_update,
       case when a.name || ':' || c.number::text = any ($2::text[]) then null else c.der end as der
from authority a left join crl c on c.authority = a.name
where $1::text is null or a.name = $1 order by a.name;

-- name: save_crl!
-- params: 1 authority, 2 CRL number text, 3 this update, 4 next update, 5 list (DER)
insert into crl (authority, number, this_update, next_update, der) values ($1, $2::text::numeric, $3, $4, $5)
on conflict (authority) do update set number = excluded.number, this_update = excluded.this_update,
  next_update = excluded.next_update, der = excluded.der;
