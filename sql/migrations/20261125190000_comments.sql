-- migrate:up

-- What each table and column is. docs/schema.md is generated from these comments.

comment on table device_type is 'A device type: what all devices of one kind may do. Its topic rules are in topic_rule.';
comment on column device_type.name is 'Letter, then up to 62 letters, digits, "_" and "-". Devices and rules refer to it.';
comment on column device_type.description is 'For people; no decision uses it.';
comment on column device_type.client_ids is 'Patterns of the MQTT client identifiers that a device may use, for example {device_id}_*. Empty: none.';
comment on column device_type.vhosts is 'Virtual hosts that the devices may use. Empty: none.';
comment on column device_type.networks is 'Networks from which the devices may connect. Null: any address.';
comment on column device_type.max_staleness_s is 'Seconds for which replicas may serve these devices from an old copy of the registry, if shorter than their own setting. Null: their own setting.';
comment on column device_type.require_known_certificate is 'True: a sweep closes connections whose certificate is not on record.';

comment on table device is 'A device. It logs in over MQTT with a client certificate that has its common name.';
comment on column device.device_id is 'Identifier for people and for the {device_id} placeholder of rules.';
comment on column device.common_name is 'Common name (CN) of the device''s certificate; RabbitMQ sends it as the user name.';
comment on column device.type is 'Name of the device type.';
comment on column device.status is 'pending, active, suspended or revoked. Only an active device may connect.';
comment on column device.status_reason is 'Why it has this status, for people.';
comment on column device.status_changed_at is 'When the status last changed.';
comment on column device.attributes is 'Values for the {attr.NAME} placeholders of rules: a JSON object of strings.';
comment on column device.expires_at is 'From this time on the device is denied. Null: never.';

comment on table account is 'An identity that is not a device: a service, an operator, a program that speaks AMQP.';
comment on column account.name is 'User name, or common name of the certificate.';
comment on column account.login is 'How it logs in: password or certificate.';
comment on column account.password_hash is 'argon2id hash of the password. Never shown in the audit trail.';
comment on column account.tags is 'RabbitMQ user tags, for example management.';
comment on column account.vhosts is 'Virtual hosts that it may use. Empty: none.';
comment on column account.networks is 'Networks from which it may open an AMQP or MQTT connection. Null: any address. The management API is not covered.';
comment on column account.client_ids is 'MQTT client identifiers that it may use. Empty: none.';
comment on column account.configure is 'Queues and exchanges that it may declare and delete; "*" stands for any run of characters.';
comment on column account.write is 'Queues and exchanges that it may write to; "*" as in configure.';
comment on column account.read is 'Queues and exchanges that it may read from; "*" as in configure.';
comment on column account.unchecked_dead_lettering is 'True: it may hold rights that together bypass topic rules, because RabbitMQ checks no routing key when it dead-letters.';

comment on table topic_rule is 'A topic rule of one device type, device or account. A deny rule wins over every allow rule; without an allow rule a topic is denied.';
comment on column topic_rule.id is 'Number of the rule, as explain and logs show it.';
comment on column topic_rule.device_type is 'The device type that the rule belongs to. Exactly one of device_type, device_id and account is set.';
comment on column topic_rule.device_id is 'The device that the rule belongs to.';
comment on column topic_rule.account is 'The account that the rule belongs to.';
comment on column topic_rule.effect is 'allow or deny.';
comment on column topic_rule.action is 'publish or subscribe.';
comment on column topic_rule.topic is 'MQTT topic filter, with placeholders such as {device_id}.';
comment on column topic_rule.exchange is 'Only for accounts: the topic exchange that the rule is about. Null: the MQTT exchange.';
comment on column topic_rule.note is 'For people; no decision uses it.';

comment on table device_schedule is 'A change of a device''s status that is to happen later, one per device and time.';
comment on column device_schedule.device_id is 'The device.';
comment on column device_schedule.at is 'When the status changes.';
comment on column device_schedule.status is 'The new status: active, suspended or revoked.';
comment on column device_schedule.reason is 'Becomes the device''s status_reason.';
comment on column device_schedule.claimed_by is 'Who scheduled it, as the client program said.';
comment on column device_schedule.actor is 'Who scheduled it, as the database checked it.';

comment on table audit is 'The audit trail: one row for every row that a statement inserted, updated or deleted, written in the same transaction.';
comment on column audit.id is 'Number of the row. Not an order of commits.';
comment on column audit.at is 'When the row was changed; not when the change was committed.';
comment on column audit.version is 'Transaction id of the change.';
comment on column audit.role is 'The role that logged in (session_user).';
comment on column audit.claimed_by is 'Who acted, as the client program said (authbackend.actor). Not checked.';
comment on column audit.actor is 'Who acted: the role that logged in, or whom a role with authbackend_speaks_for_others named.';
comment on column audit.application is 'application_name of the session.';
comment on column audit.address is 'Address of the client. Null: a Unix socket.';
comment on column audit.operation is 'INSERT, UPDATE, DELETE, TRUNCATE, or ACCEPT for a mass change that was accepted.';
comment on column audit.entity is 'The table that was changed.';
comment on column audit.key is 'Key of the row.';
comment on column audit.before is 'The row before the change, without secrets. Null for an insert.';
comment on column audit.after is 'The row after the change, without secrets. Null for a delete.';

comment on table authority is 'A certificate authority that has issued certificates on record.';
comment on column authority.name is 'Name for people, commands and the URL of its revocation list.';
comment on column authority.subject is 'Subject of its certificate (RFC 4514): the issuer of what it signs.';
comment on column authority.certificate_pem is 'Its certificate, PEM. Never a private key.';
comment on column authority.not_after is 'When its certificate ends.';
comment on column authority.added_at is 'When it was added.';

comment on table certificate is 'A certificate on record. Private keys are never in the database.';
comment on column certificate.fingerprint is 'SHA-256 of the certificate (DER), lower-case hexadecimal.';
comment on column certificate.serial is 'Serial number, lower-case hexadecimal.';
comment on column certificate.issuer is 'Issuer (RFC 4514).';
comment on column certificate.subject is 'Subject (RFC 4514).';
comment on column certificate.common_name is 'Common name, as RabbitMQ takes it for the user name.';
comment on column certificate.not_before is 'Start of its validity.';
comment on column certificate.not_after is 'End of its validity.';
comment on column certificate.device_id is 'The device that it belongs to. Null: none yet.';
comment on column certificate.state is 'active or revoked.';
comment on column certificate.reason is 'Why it was revoked, a reason of RFC 5280 section 5.3.1.';
comment on column certificate.revoked_at is 'When it was revoked.';
comment on column certificate.added_at is 'When it was put on record.';
comment on column certificate.key_fingerprint is 'SHA-256 of its public key (SubjectPublicKeyInfo, DER). Null: recorded by a version that did not keep it.';

comment on table crl is 'The current certificate revocation list of each authority.';
comment on column crl.authority is 'Name of the authority.';
comment on column crl.number is 'CRL number (RFC 5280 section 5.2.3).';
comment on column crl.this_update is 'When it was issued.';
comment on column crl.next_update is 'Until when brokers accept it.';
comment on column crl.der is 'The list, DER.';

comment on table crl_highest is 'The highest CRL number each authority has ever used, so that numbers never go down.';
comment on column crl_highest.issuer is 'Subject of the authority.';
comment on column crl_highest.number is 'The CRL number.';
comment on column crl_highest.digest is 'Hash of the list with this number: the same number never stands for two lists.';

comment on table crl_listed is 'What is on the current list of each authority.';
comment on column crl_listed.issuer is 'Subject of the authority.';
comment on column crl_listed.serial is 'Serial number of the revoked certificate.';
comment on column crl_listed.number is 'CRL number of the first list that had it.';

comment on table crl_installed is 'Which list the host of each RabbitMQ node has installed, as its `crl sync` reports.';
comment on column crl_installed.node is 'Name of the node, for example rabbit@host.';
comment on column crl_installed.issuer is 'Subject of the authority.';
comment on column crl_installed.number is 'CRL number of the installed list.';
comment on column crl_installed.next_update is 'Until when the installed list is accepted.';
comment on column crl_installed.reported_at is 'When it was last reported.';

comment on column crl_installed.counts_until is 'Until then the report counts; a host that reports nothing later is not known to have its list still.';

comment on table crl_reporter is 'Which role reports for which node. One role for one node, and one node for one role.';
comment on column crl_reporter.node is 'Name of the node.';
comment on column crl_reporter.role is 'The role that reported first; no other one can.';
comment on column crl_reporter.since is 'When it did.';

comment on table enforcement is 'A task of enforcement: what one change took away, to be made true for live connections and stored sessions of one cluster, and the receipt.';
comment on column enforcement.id is 'Number of the task.';
comment on column enforcement.version is 'Transaction id of the change.';
comment on column enforcement.kind is 'What it is about: device, device_type, account or certificate.';
comment on column enforcement.name is 'Which one.';
comment on column enforcement.causes is 'Why it was noted, for example revoked or rules_narrowed.';
comment on column enforcement.details is 'What else is needed to do it, for example former names.';
comment on column enforcement.parent is 'The task on whose behalf it was noted.';
comment on column enforcement.role is 'The role that made the change.';
comment on column enforcement.claimed_by is 'Who made the change, as the client program said.';
comment on column enforcement.actor is 'Who made the change, as the database checked it.';
comment on column enforcement.noted_at is 'When it was noted.';
comment on column enforcement.due_at is 'When it is to be done or tried again.';
comment on column enforcement.state is 'waiting, checking (closed, to be looked at once more), done, or superseded (its cause was undone).';
comment on column enforcement.attempts is 'How often it was tried.';
comment on column enforcement.fault is 'Why the last attempt failed.';
comment on column enforcement.receipt is 'What was seen and done, when and on which nodes.';
comment on column enforcement.finished_at is 'When it was closed. Null: open.';
comment on column enforcement.cluster is 'Name of the RabbitMQ cluster.';
comment on column enforcement.lane is 'urgent or mass; see docs/enforcement.md.';

comment on table enforcement_cluster is 'The RabbitMQ clusters that tasks are noted for.';
comment on column enforcement_cluster.name is 'Name of the cluster: the first host in its URLs.';
comment on column enforcement_cluster.added_at is 'When a replica with this cluster in its settings first led enforcement.';

comment on table enforcement_expiry is 'Up to when expired devices have been noted. One row.';
comment on column enforcement_expiry.one is 'Always true: the table has one row.';
comment on column enforcement_expiry.noted_until is 'Devices with an earlier expires_at have their tasks.';

comment on table enforcement_pause is 'The pause of enforcement that is in force. At most one row.';
comment on column enforcement_pause.one is 'Always true: the table has one row.';
comment on column enforcement_pause.scope is 'bulk: the urgent lane goes on; all: nothing is done.';
comment on column enforcement_pause.since is 'When it began.';
comment on column enforcement_pause.until is 'When it ends by itself, an hour later at most.';
comment on column enforcement_pause.role is 'The role that paused.';
comment on column enforcement_pause.claimed_by is 'Who paused, as the client program said.';
comment on column enforcement_pause.actor is 'Who paused, as the database checked it.';

comment on table enforcement_setup is 'One row where a service enforces; without it no tasks are noted.';
comment on column enforcement_setup.one is 'Always true: the table has one row.';
comment on column enforcement_setup.hold_limit_s is 'Seconds after which a hold ends even if its task is open.';

comment on table enforcement_sweep is 'The latest sweep of each cluster.';
comment on column enforcement_sweep.cluster is 'Name of the cluster.';
comment on column enforcement_sweep.at is 'When it ended.';
comment on column enforcement_sweep.report is 'What was compared, found and ended.';

comment on table device_hold is 'Devices that may not log in while their connections and sessions are repaired.';
comment on column device_hold.device_id is 'The device.';
comment on column device_hold.since is 'When the hold began.';
comment on column device_hold.until is 'When it ends by itself.';

comment on table client_id_move is 'Client identifiers that pass from one device to another because the patterns of a type were widened.';
comment on column client_id_move.device_type is 'The type whose patterns were widened.';
comment on column client_id_move.former is 'The patterns before.';
comment on column client_id_move.held is 'Client identifiers that are still in use by the former owner. Null: not looked up yet, all that move are held.';
comment on column client_id_move.since is 'When it began.';
comment on column client_id_move.until is 'When it ends by itself.';

comment on table replica is 'One start of a replica of the service, with the registry version that it serves.';
comment on column replica.id is 'Identifier of this start.';
comment on column replica.name is 'replica.name of its settings, or the host name.';
comment on column replica.program_version is 'Version of authbackend.';
comment on column replica.workers is 'How many worker processes it has.';
comment on column replica.longest_staleness_s is 'registry.max_staleness_s of its settings: how old a copy it decides by.';
comment on column replica.introduced_at is 'When it started.';
comment on column replica.epoch is 'Which server and database it read: transaction ids mean the same only within one epoch.';
comment on column replica.incarnation is 'Life of the database since its last crash recovery; part of a registry version.';
comment on column replica.snapshot is 'The transactions whose changes all its workers decide by.';
comment on column replica.confirmed_at is 'When the database last confirmed that copy, by the database''s clock.';
comment on column replica.stopped_at is 'When it signed off.';
comment on column replica.comes_back is 'It signed off but can start again from its copy on disk.';
comment on column replica.folder is 'Identifier of its data folder. Null: it has none.';

comment on view replica_state is 'replica, with what follows from it now.';
comment on column replica_state.id is 'See replica.';
comment on column replica_state.name is 'See replica.';
comment on column replica_state.program_version is 'See replica.';
comment on column replica_state.workers is 'See replica.';
comment on column replica_state.longest_staleness_s is 'See replica.';
comment on column replica_state.introduced_at is 'See replica.';
comment on column replica_state.epoch is 'See replica.';
comment on column replica_state.incarnation is 'See replica.';
comment on column replica_state.snapshot is 'See replica.';
comment on column replica_state.confirmed_at is 'See replica.';
comment on column replica_state.stopped_at is 'See replica.';
comment on column replica_state.comes_back is 'See replica.';
comment on column replica_state.folder is 'See replica.';
comment on column replica_state.state is 'live, silent or stopped.';
comment on column replica_state.may_answer is 'It may still be answering RabbitMQ, so whoever waits for a change waits for it.';
comment on column replica_state.counts_until is 'From then on the copy that it had is too old to decide by.';
comment on column replica_state.twins is 'How many other starts run from the same data folder.';

comment on table change is 'The change feed: which rows of the registry each transaction changed.';
comment on column change.txid is 'Transaction id.';
comment on column change.entity is 'device, device_type or account.';
comment on column change.key is 'Key of the changed row.';

comment on table change_floor is 'How far the change feed was pruned. One row.';
comment on column change_floor.one is 'Always true: the table has one row.';
comment on column change_floor.floor is 'Changes of older transactions may be gone.';

comment on table change_horizon is 'Which transactions had ended at which time, for pruning the change feed.';
comment on column change_horizon.at is 'The time.';
comment on column change_horizon.horizon is 'All older transactions had ended.';

comment on table incarnation is 'Identifies one life of the server: unlogged, so a crash recovery empties it.';
comment on column incarnation.one is 'Always true: the table has one row.';
comment on column incarnation.id is 'The life.';

comment on table identity_guard is 'A row to lock, so that checks across tables see each other''s changes.';
comment on column identity_guard.one is 'Always true: the table has one row.';
comment on column identity_guard.writers is 'Counts the writers.';

comment on table acting_for is 'For whom the session acts while it makes a scheduled change. Empty otherwise.';
comment on column acting_for.backend is 'Process id of the session.';
comment on column acting_for.person is 'Who scheduled the change.';

comment on table brake is 'The limits of the brake on mass change. One row; without it the limits are 100 devices and 5 percent.';
comment on column brake.one is 'Always true: the table has one row.';
comment on column brake.devices is 'A transaction is refused if it takes something from more devices than this and from more than percent of all.';
comment on column brake.percent is 'See devices.';

comment on table brake_impact is 'What each open transaction takes something from.';
comment on column brake_impact.version is 'Transaction id.';
comment on column brake_impact.kind is 'device, account or certificate.';
comment on column brake_impact.name is 'Which one.';
comment on column brake_impact.cause is 'What was done to it, for example revoked.';

comment on table brake_acceptance is 'What accept_impact() allows each open transaction.';
comment on column brake_acceptance.version is 'Transaction id.';
comment on column brake_acceptance.accepted is 'From how many devices, accounts and certificates together it may take something.';

comment on table schema_migrations is 'The migrations that have been applied, as dbmate keeps them.';
comment on column schema_migrations.version is 'Number of the migration: the first part of its file''s name.';

-- migrate:down
