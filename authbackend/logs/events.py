"""All log events with level, meaning and what to do; ``docs/log-events.md`` is generated from them."""

from __future__ import annotations

EVENTS = {
    "broker.request_crashed": (
        "error",
        "A bug in authbackend: a request from RabbitMQ was answered with 503. Please report it.",
    ),
    "broker.unknown_path": (
        "warning",
        "RabbitMQ sent a request to a path that does not exist, so it refuses everybody whom it checks there. Correct `auth_http.*_path` in `rabbitmq.conf`. Logged at most once a minute.",
    ),
    "certificates.not_reloaded": (
        "error",
        "The certificate files of a listener have changed and cannot be used; the old ones stay in use. Correct the files that `fault` names.",
    ),
    "certificates.reloaded": ("info", "The certificate files were read again; new connections use them."),
    "crl.authority_reloaded": (
        "info",
        "The files of `pki.authority_dir` were read again; new CRLs are signed with them.",
    ),
    "crl.expired": (
        "error",
        "The CRL that `crl sync` installed has expired: the broker refuses every certificate. Find out why no newer one arrives.",
    ),
    "crl.file_unusable": (
        "warning",
        "`crl sync` cannot read the file of an installed CRL; it is replaced as soon as a CRL arrives.",
    ),
    "crl.late": (
        "warning",
        "The installed CRL is near its end and no newer one has arrived: at `next_update` the broker refuses every certificate.",
    ),
    "crl.not_updated": ("warning", "`crl sync` could not fetch or install a CRL; `error` says why. It tries again."),
    "crl.tls_files_not_reloaded": (
        "warning",
        "The TLS files of `crl sync` have changed and cannot be used; the old ones stay in use.",
    ),
    "crl.following": ("info", "CRLs can be read and signed again."),
    "crl.not_reported": (
        "warning",
        "`crl sync` installed a CRL but could not report it to the database; receipts wait for the report, which is tried again.",
    ),
    "crl.refresh_crashed": (
        "error",
        "A bug in authbackend while reading or signing CRLs. Please report it.",
    ),
    "crl.refresh_failed": (
        "warning",
        "CRLs could not be read or signed; the current ones are still served. Act before they expire, because brokers then refuse every certificate.",
    ),
    "crl.replaced": ("info", "`crl sync` installed a new CRL."),
    "crl.reported": ("info", "`crl sync` can report to the database again."),
    "crl.signed": ("info", "A new CRL was signed."),
    "database.clock_stepped": (
        "error",
        "The database's clock was set forward. The wait for replicas that are cut off does not get shorter. Configure NTP to slew the clock, not step it.",
    ),
    "database.not_writable": (
        "warning",
        "The database can be read but not written: it is a standby, read-only, or full. Changes are still followed; work that needs to write waits.",
    ),
    "database.writable": ("info", "The database can be written again."),
    "denials_not_logged": ("info", "`number` earlier denials were not logged, because there were too many."),
    "denied": ("info", "A request was denied, with its [reason](reasons.md) and the rule that decided."),
    "enforcement.ca_not_reloaded": (
        "error",
        "`enforcement.ca_file` has changed and cannot be used; the old one stays in use. Correct the file that `fault` names.",
    ),
    "enforcement.ca_reloaded": ("info", "`enforcement.ca_file` was read again; the next request uses it."),
    "enforcement.cluster_unknown": (
        "warning",
        "There are open tasks for a cluster that is not in this replica's settings. Add it there, or remove it with `authbackend enforcement forget`.",
    ),
    "enforcement.crashed": (
        "error",
        "A bug in authbackend stopped a part of enforcement; it is restarted. Please report it.",
    ),
    "enforcement.ended": ("info", "Connections were closed and queues deleted for one task."),
    "enforcement.failed": ("warning", "Tasks could not be completed on a cluster; they stay open and are tried again."),
    "enforcement.leading": ("info", "This replica is now the leader and enforces."),
    "enforcement.left": ("warning", "This replica is no longer the leader; another one takes over."),
    "enforcement.lock_taken": (
        "error",
        "A session that is not a replica's holds the enforcement lock, so no replica enforces. End the session that the line names.",
    ),
    "enforcement.part_failed": ("warning", "A part of enforcement stopped and is restarted."),
    "enforcement.part_running": ("info", "A part of enforcement that had stopped is running again."),
    "enforcement.paused": ("warning", "Enforcement is paused; it resumes by itself when the pause ends."),
    "enforcement.resumed": ("info", "Enforcement has resumed."),
    "enforcement.unreachable": ("debug", "A cluster does not answer; requests are tried again."),
    "health.crashed": (
        "error",
        "A bug in authbackend: a health check was answered with 503. Please report it.",
    ),
    "malformed": (
        "info",
        "A malformed request was denied; RabbitMQ does not send such requests. Usually the client is not RabbitMQ.",
    ),
    "note.not_read": ("debug", "A process of the replica could not read what another one had written; it tries again."),
    "note.not_written": (
        "warning",
        "The processes of a replica could not share their state: the file system in memory is full.",
    ),
    "process.crashed": ("error", "A bug in authbackend ended a process; the parent restarts it. Please report it."),
    "process.died": ("error", "A process ended and is restarted after `again_in_s`."),
    "process.failed": ("error", "A process could not start; `fault` says why."),
    "registry.changed": ("info", "Changes were read; all new decisions use them."),
    "registry.compare_crashed": (
        "error",
        "A bug in authbackend in the regular comparison with the database. Please report it.",
    ),
    "registry.compare_failed": (
        "warning",
        "The copy could not be compared with the database; the comparison is tried again.",
    ),
    "registry.differs": (
        "error",
        "The copy differed from the database and is reloaded. Something bypassed the triggers, for example a restore.",
    ),
    "registry.disk_copy_refused": ("error", "The copy on disk cannot be used; the replica starts without it."),
    "registry.entity_unknown": (
        "warning",
        "The database has a kind of row that this version does not know; it is ignored. Upgrade this replica.",
    ),
    "registry.following": ("info", "The database can be read again."),
    "registry.listen_crashed": (
        "error",
        "A bug in authbackend while listening for changes; polling goes on. Please report it.",
    ),
    "registry.loaded": ("info", "The whole registry was loaded."),
    "registry.not_on_disk": (
        "error",
        "A change could not be written to the copy on disk. This replica does not confirm the change, so `--wait` names the replica.",
    ),
    "registry.refresh_crashed": (
        "error",
        "A bug in authbackend while reading the registry; reading is tried again. Please report it.",
    ),
    "registry.refresh_failed": (
        "warning",
        "The registry could not be read; decisions still use the copy, which is `copy_age_s` old.",
    ),
    "registry.restored": ("info", "The copy on disk, `age_s` old, was loaded."),
    "registry.served_changes_gone": (
        "error",
        "After a failover or a restore, the database lacks changes that replicas had already used in decisions. The line names them; make them again if they are still wanted.",
    ),
    "registry.served_changes_unknown": (
        "warning",
        "After a failover or a restore, it is unknown whether changes that replicas had already used in decisions are lost.",
    ),
    "replica.announcement_crashed": ("error", "A bug in authbackend while announcing this replica. Please report it."),
    "replica.not_announced": (
        "debug",
        "This replica could not report to the database which registry version it serves.",
    ),
    "replica.not_signed_off": (
        "warning",
        "This replica stopped without signing off; others wait for it until its copy is stale.",
    ),
    "request.crashed": (
        "error",
        "A bug in authbackend: a request to the listener for people or for health was answered with 500. Please report it.",
    ),
    "schedule.blocked": (
        "warning",
        "A scheduled change waits because another session has locked the device's row; `held_by` says which.",
    ),
    "schedule.failed": ("error", "A scheduled change cannot be made; `fault` says why."),
    "service.listening": ("info", "The service is listening on these addresses."),
    "service.reloading": ("info", "SIGHUP received: certificates are read again."),
    "service.stopped": ("info", "All processes have ended."),
    "service.stopping": ("info", "SIGTERM or SIGINT received: requests in flight are finished."),
    "sweep.failed": ("warning", "A cluster could not be swept; the next sweep tries again."),
    "sweep.found": (
        "warning",
        "A sweep found a connection or session that the registry does not allow; see `authbackend enforcement sweeps`.",
    ),
}
"""Event: (level, meaning). A test compares them with the code."""
