-- migrate:up

-- Each column of replica_state has its own sentence. Comments and messages that named wrong or incomplete values are corrected.

comment on view replica_state is 'The replicas, each with its current state, worked out from the table replica.';
comment on column replica_state.id is 'Identifier of one start of the replica; a restart has a new one.';
comment on column replica_state.name is 'Name of the replica for people: replica.name of its settings, or the host name.';
comment on column replica_state.program_version is 'Version of authbackend that the replica runs.';
comment on column replica_state.workers is 'Number of worker processes of the replica.';
comment on column replica_state.longest_staleness_s is 'Seconds for which the replica may answer from its copy without the database (registry.max_staleness_s of its settings).';
comment on column replica_state.introduced_at is 'When the replica last registered, which it does on each new connection to the database.';
comment on column replica_state.epoch is 'Server and database that the copy was read from; transaction ids can be compared only within one epoch. Null: nothing was read yet.';
comment on column replica_state.incarnation is 'Incarnation of the database that the copy was read from; a crash recovery begins a new one. Null: nothing was read yet.';
comment on column replica_state.snapshot is 'The transactions whose changes are in the copy of every worker (pg_snapshot). Null: nothing was read yet.';
comment on column replica_state.confirmed_at is 'Start of the last read that found the copy up to date, by the database''s clock. Null: nothing was read yet.';
comment on column replica_state.stopped_at is 'When the replica signed off. Null: it did not.';
comment on column replica_state.comes_back is 'True: the replica signed off, but can start again from its copy on disk without the database.';
comment on column replica_state.state is 'starting (nothing was read yet), live, silent (not heard from for 10 s), stopped (signed off) or gone (its copy is too old to answer from).';
comment on column replica_state.may_answer is 'True: the replica may still answer RabbitMQ, so a change is not confirmed before the replica serves it.';
comment on column replica_state.counts_until is 'When the copy becomes too old to answer from, plus 5 s for differences between clocks.';
comment on column replica_state.folder is 'Identifier of the data folder (registry.snapshot_dir) that the replica runs from. Null: it has none.';
comment on column replica_state.twins is 'Number of other starts heard from in the last 10 s that run from the same data folder or a copy of it.';

comment on column replica.longest_staleness_s is 'Seconds for which it may answer from its copy without the database (registry.max_staleness_s of its settings).';
comment on column replica.introduced_at is 'When it last registered, which it does on each new connection to the database.';
comment on column replica.epoch is 'Server and database that its copy was read from; transaction ids can be compared only within one epoch.';
comment on column replica.incarnation is 'Incarnation of the database that its copy was read from; a crash recovery begins a new one.';
comment on column replica.snapshot is 'The transactions whose changes are in the copy of every worker.';
comment on column replica.confirmed_at is 'Start of the last read that found the copy up to date, by the database''s clock.';
comment on column replica.comes_back is 'True: it signed off, but can start again from its copy on disk without the database.';

comment on table incarnation is 'The incarnation of the database, part of every registry version. The table is unlogged: a crash recovery empties it, and the next one begins.';
comment on column incarnation.id is 'Random identifier of the incarnation.';

comment on column audit.operation is 'INSERT, UPDATE, DELETE or TRUNCATE; ACCEPT for a mass change that was accepted, FORGET for old rows of the trail that were deleted, ENABLE TRIGGER for triggers that had been disabled.';
comment on column audit.entity is 'The table that was changed; impact for ACCEPT.';
comment on column audit.key is 'Key of the row. Null: the operation is not about a single row.';

comment on column brake.percent is 'The other limit, in percent of all registered devices. Only a transaction beyond both limits is refused.';

comment on table brake_impact is 'The devices, accounts and certificates that each open transaction takes something from.';
comment on column brake_impact.kind is 'device, account or certificate; device_type marks a type whose devices have been added and is not counted.';
comment on column brake_impact.name is 'device_id, name of the account or device type, or fingerprint of the certificate.';
comment on column brake_impact.cause is 'What was done to it, for example revoked. Empty for a device_type.';

comment on column brake_acceptance.accepted is 'From how many devices, accounts and certificates together it may take something. Null: any number, for scheduled changes, which were counted when they were scheduled.';

comment on column change.entity is 'device, device_type or account. A rule, hold or move of client identifiers counts as a change of its owner.';
comment on column change.key is 'Key of the changed row; * for all rows of the entity, after TRUNCATE.';

comment on column change_horizon.at is 'When the row was written.';

comment on table enforcement is 'The tasks of enforcement, each with its receipt: what a change took away must also be ended for the live connections and stored sessions of one cluster.';
comment on column enforcement.name is 'device_id, name of the device type or account, or serial number of the certificate.';
comment on column enforcement.causes is 'What was taken away, for example revoked, rules or client_ids.';
comment on column enforcement.attempts is 'How many attempts have failed.';
comment on column enforcement.state is 'waiting for the first attempt; checking once more that nothing is left; done; or superseded: its cause was undone, or its cluster forgotten.';
comment on column enforcement.lane is 'urgent, small or mass; small and mass are the bulk lane. See docs/enforcement.md.';

comment on column enforcement_pause.scope is 'bulk: only the urgent lane goes on; all: no lane goes on.';

comment on table enforcement_expiry is 'How far the expiry times of devices have been turned into tasks. One row.';

comment on column client_id_move.held is 'Client identifiers that the former owner still uses. Null: not looked up yet, so all that move are held.';

comment on column crl_installed.counts_until is 'How long the report is valid. After that, it is unknown whether the host still has the list.';

comment on column crl_reporter.since is 'When the role first reported.';

comment on column certificate.device_id is 'The device that it belongs to. Null: no registered device.';

-- The number also covers accounts and certificates.
create or replace function accept_impact(number bigint) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if number is null or number < 0 then
    perform public.refuse('accept_impact() needs how many devices, accounts and certificates something may be taken from; the refused statement names the number');
  end if;
  insert into public.brake_acceptance (accepted) values (number) on conflict (version) do update set accepted = excluded.accepted;
end $$;

create or replace function device_truncate() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if exists (select from public.certificate where device_id is not null and state = 'active' and not_after > now()) then
    perform public.refuse('TRUNCATE of the devices would also empty the table of certificates, and some devices have valid certificates. DELETE the devices instead, which revokes their certificates');
  end if;
  return null;
end $$;

create or replace function certificate_truncate() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if exists (select from public.certificate where state = 'revoked' and not_after > now()) then
    perform public.refuse('TRUNCATE would empty the table of certificates, and some are revoked and not expired: without their rows they would be missing from the revocation list');
  end if;
  return null;
end $$;

create or replace function name_list_fault(names text[], longest_bytes integer) returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp as $$
  select case
    when names is null then 'the list is null; write {} for none'
    when coalesce(array_ndims(names), 1) <> 1 then 'the list has more than one dimension'
    when array_position(names, null) is not null then 'an entry is null'
    when array_position(names, '') is not null then 'an entry is empty'
    when exists (select from unnest(names) as n where octet_length(n) > longest_bytes) then format('an entry is longer than %s bytes', longest_bytes)
    when exists (select from unnest(names) as n group by n having count(*) > 1) then 'duplicate entry'
  end
$$;

-- migrate:down
