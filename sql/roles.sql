-- Roles of least privilege. Optional: run it once per database as the owner of the tables, after
-- `authbackend migrate`; run it again after an upgrade. Give each role its password and LOGIN yourself:
--   ALTER ROLE authbackend_service LOGIN PASSWORD '...';
--
--   authbackend_service   `authbackend serve`: reads the registry, prunes the change feed, records which version it serves, enforces,
--                         publishes revocation lists; writes nothing else
--   authbackend_admin     `authbackend policy|device|account|ca|cert|crl`, psql of the security team: edits the registry and the certificates, reads the audit trail
--   authbackend_crl_sync  `authbackend crl sync --node` on the hosts of brokers: reports which revocation list is installed, reads nothing.
--                         A role reports for one node, so create one for each host: CREATE ROLE crl_rabbit1 LOGIN IN ROLE authbackend_crl_sync
--   authbackend_reader    dashboards and auditors: reads everything but password hashes
--   authbackend_speaks_for_others   has no privileges: a role that is granted it names the person for the audit trail (SET
--                         authbackend.actor) and is believed. Only for a program that has authenticated its users.
--
-- The trail names the role that logged in, so give each person a role: CREATE ROLE ann LOGIN IN ROLE authbackend_admin;

do $$
declare
  r text;
begin
  foreach r in array array['authbackend_service', 'authbackend_admin', 'authbackend_reader', 'authbackend_crl_sync', 'authbackend_speaks_for_others'] loop
    if not exists (select from pg_roles where rolname = r) then
      execute format('create role %I nologin nosuperuser nocreatedb nocreaterole', r);
    end if;
    continue when r = 'authbackend_speaks_for_others';
    execute format('grant connect on database %I to %I', current_database(), r);
    execute format('grant usage on schema public to %I', r);
  end loop;
end $$;

-- Databases created before PostgreSQL 15 let every role create functions and tables here.
revoke create on schema public from public;

revoke all on device_type, device, account, topic_rule, audit, change, change_floor, change_horizon, incarnation, identity_guard, replica, replica_state, certificate, authority, crl, crl_highest, crl_listed, crl_installed, crl_reporter, schema_migrations,
  enforcement, enforcement_setup, enforcement_cluster, enforcement_pause, enforcement_expiry, enforcement_sweep, device_hold, client_id_move, device_schedule, acting_for, brake, brake_impact, brake_acceptance
  from public, authbackend_service, authbackend_admin, authbackend_reader, authbackend_crl_sync;

grant select on device_type, device, account, topic_rule, change, change_floor, incarnation, schema_migrations to authbackend_service;
grant select, insert, update, delete on replica to authbackend_service;
grant select on replica_state to authbackend_service, authbackend_admin, authbackend_reader;
grant execute on function change_prune(interval), incarnation_renew() to authbackend_service;
grant select, insert, update, delete on enforcement, enforcement_sweep to authbackend_service;
grant select, insert, update on enforcement_setup to authbackend_service;
grant select, insert on enforcement_cluster to authbackend_service;
grant select on enforcement_pause to authbackend_service;
grant select, update, delete on device_hold, client_id_move to authbackend_service;
grant execute on function enforcement_hold(text[]), enforcement_note_expired(), device_schedule_apply(), enforcement_overdue() to authbackend_service;
grant execute on function enforcement_overdue() to authbackend_admin, authbackend_reader;

grant select on certificate, authority, crl_highest, crl_installed to authbackend_service;
grant select, insert, update, delete on crl_listed to authbackend_service, authbackend_admin;
grant execute on function crl_report(text, text, numeric, timestamptz, double precision) to authbackend_crl_sync;
grant select, insert, update on crl to authbackend_service; -- a trigger refuses lists with an older number

grant select, insert, update, delete on device_type, device, account, topic_rule to authbackend_admin;
grant select, insert, update, delete on certificate, authority, crl to authbackend_admin;
grant execute on function certificate_forget(interval, bigint) to authbackend_admin; -- only its owner deletes from the audit trail
grant select on crl_highest to authbackend_admin, authbackend_reader;
grant select on crl_listed to authbackend_reader;
grant select on crl_installed, crl_reporter to authbackend_admin, authbackend_reader;
grant execute on function crl_forget(text) to authbackend_admin;
grant select on audit, change, change_floor, incarnation, schema_migrations to authbackend_admin;
grant select on replica to authbackend_admin;
grant execute on function incarnation_renew() to authbackend_admin;
-- No UPDATE, not even of one column: with it a role can lock rows, and a locked task cannot be closed.
grant select on enforcement, enforcement_setup, enforcement_cluster, enforcement_pause, enforcement_sweep, device_hold, client_id_move to authbackend_admin;
grant execute on function enforcement_retry(bigint), enforcement_pause_begin(text), enforcement_pause_end(), enforcement_cluster_forget(text), enforcement_disable(), replica_forget(text) to authbackend_admin;
grant select, insert, delete, update (at, status, reason) on device_schedule to authbackend_admin;
grant select on brake to authbackend_admin, authbackend_reader; -- the owner sets it
grant execute on function accept_impact(bigint), impact() to authbackend_admin;

grant select on device_type, device, topic_rule, audit, incarnation, certificate, authority, crl, schema_migrations, enforcement, enforcement_setup, enforcement_cluster, enforcement_pause, enforcement_sweep, device_hold, client_id_move, device_schedule to authbackend_reader;
grant select (name, login, tags, vhosts, networks, client_ids, configure, write, read, unchecked_dead_lettering) on account to authbackend_reader;
