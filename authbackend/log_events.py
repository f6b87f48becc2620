"""The events that logs can show: level, meaning, and what to do. ``docs/log-events.md`` is made from them."""

from __future__ import annotations

EVENTS = {
    "broker.request_crashed": (
        "error",
        "A bug in authbackend: a question of RabbitMQ was answered with 503. Please report it.",
    ),
    "broker.unknown_path": (
        "warning",
        "RabbitMQ asks at a path that does not exist, so it refuses everybody it asks about there. Correct `auth_http.*_path` in `rabbitmq.conf`. At most once a minute.",
    ),
    "certificates.not_reloaded": (
        "error",
        "The certificate files of a listener changed and cannot be used; the old ones stay in use. Correct the files that `fault` names.",
    ),
    "certificates.reloaded": ("info", "The certificate files were read again; new connections use them."),
    "crl.authority_reloaded": ("info", "The files of `pki.authority_dir` were read again; lists are signed with them."),
    "crl.following": ("info", "Revocation lists can be read and signed again."),
    "crl.not_reported": (
        "warning",
        "`crl sync` installed a list and could not report it to the database; receipts wait for it. It tries again.",
    ),
    "crl.refresh_crashed": (
        "error",
        "A bug in authbackend while reading or signing revocation lists. Please report it.",
    ),
    "crl.refresh_failed": (
        "warning",
        "Revocation lists could not be read or signed; the ones that are served stay. Act before they expire: brokers refuse every certificate then.",
    ),
    "crl.replaced": ("info", "`crl sync` installed a new list."),
    "crl.reported": ("info", "`crl sync` can report to the database again."),
    "crl.signed": ("info", "A new list was signed."),
    "database.clock_stepped": (
        "error",
        "The database's clock was set forward. Replicas that are cut off are waited for as long as before; let NTP slew, not step.",
    ),
    "database.not_writable": (
        "warning",
        "The database can be read and not written: it is a standby, read-only, or full. Changes are followed; nothing that must be written is done.",
    ),
    "database.writable": ("info", "The database can be written again."),
    "denials_not_logged": ("info", "So many denials of this device were not logged, because there were too many."),
    "denied": ("info", "A request was denied, with its [reason](reasons.md) and the rule that decided."),
    "enforcement.ca_not_reloaded": (
        "error",
        "`enforcement.ca_file` changed and cannot be used; the old one stays in use. Correct the file that `fault` names.",
    ),
    "enforcement.ca_reloaded": ("info", "`enforcement.ca_file` was read again; the next request uses it."),
    "enforcement.cluster_unknown": (
        "warning",
        "Tasks are open for a cluster that the settings of this replica do not name. Add it, or `authbackend enforcement forget` it.",
    ),
    "enforcement.crashed": (
        "error",
        "A bug in authbackend in a part of enforcement; it starts again. Please report it.",
    ),
    "enforcement.ended": ("info", "Connections were closed and queues deleted for one task."),
    "enforcement.failed": ("warning", "Tasks could not be done on a cluster; they stay open and are tried again."),
    "enforcement.leading": ("info", "This replica enforces from now on."),
    "enforcement.left": ("warning", "This replica does not enforce any more; another one takes over."),
    "enforcement.lock_taken": (
        "error",
        "Somebody who is not a replica holds the lock of enforcement, so nobody enforces. End the session that the line names.",
    ),
    "enforcement.part_failed": ("warning", "A part of enforcement stopped and starts again."),
    "enforcement.part_running": ("info", "A part of enforcement that had stopped runs again."),
    "enforcement.paused": ("warning", "Enforcement is paused; it goes on by itself when the pause ends."),
    "enforcement.resumed": ("info", "Enforcement goes on."),
    "enforcement.unreachable": ("debug", "A cluster does not answer; it is tried again."),
    "malformed": (
        "info",
        "A request is not one that RabbitMQ sends; it was denied. Often a client that is not RabbitMQ.",
    ),
    "note.not_read": ("debug", "A process of the replica could not read what another one wrote; it looks again."),
    "note.not_written": (
        "warning",
        "Processes of a replica could not share what they know: the memory file system is full.",
    ),
    "process.crashed": ("error", "A bug in authbackend ended a process; the parent starts it again. Please report it."),
    "process.died": ("error", "A process ended and is started again after `again_in_s`."),
    "process.failed": ("error", "A process could not start; `fault` says why."),
    "registry.changed": ("info", "Changes were read, and every new decision uses them."),
    "registry.compare_crashed": (
        "error",
        "A bug in authbackend in the regular comparison with the database. Please report it.",
    ),
    "registry.compare_failed": ("warning", "The copy could not be compared with the database; it is tried again."),
    "registry.differs": (
        "error",
        "The copy differed from the database and is loaded anew. Something bypassed the triggers, for example a restore.",
    ),
    "registry.disk_copy_refused": ("error", "The copy on disk cannot be used; the replica starts without it."),
    "registry.entity_unknown": (
        "warning",
        "The database has a kind of row that this version does not know and leaves aside. Upgrade this replica.",
    ),
    "registry.following": ("info", "The database can be read again."),
    "registry.listen_crashed": (
        "error",
        "A bug in authbackend while listening for changes; polling goes on. Please report it.",
    ),
    "registry.loaded": ("info", "The whole registry was loaded."),
    "registry.not_on_disk": (
        "error",
        "A change could not be written to the copy on disk; this replica does not confirm it, so `--wait` names it.",
    ),
    "registry.refresh_crashed": (
        "error",
        "A bug in authbackend while reading the registry; it is tried again. Please report it.",
    ),
    "registry.refresh_failed": (
        "warning",
        "The registry could not be read; decisions go on from the copy, `copy_age_s` old.",
    ),
    "registry.restored": ("info", "The copy on disk was loaded, `age_s` old."),
    "registry.served_changes_gone": (
        "error",
        "The database lacks changes that replicas had decided by, after a failover or a restore. The line names them; make them again if they were meant.",
    ),
    "registry.served_changes_unknown": (
        "warning",
        "After a failover or a restore, it cannot be told whether changes that replicas had decided by are lost.",
    ),
    "replica.announcement_crashed": ("error", "A bug in authbackend in announcing this replica. Please report it."),
    "replica.not_announced": ("debug", "This replica could not tell the database which version it serves."),
    "replica.not_signed_off": (
        "warning",
        "This replica stopped without signing off; others wait for it until its copy is stale.",
    ),
    "schedule.blocked": (
        "warning",
        "A scheduled change waits because somebody has the device's row locked; `held_by` says who.",
    ),
    "schedule.failed": ("error", "A scheduled change cannot be made; `fault` says why."),
    "service.listening": ("info", "The service answers, at these addresses."),
    "service.reloading": ("info", "SIGHUP: certificates are read again."),
    "service.stopped": ("info", "All processes have ended."),
    "service.stopping": ("info", "SIGTERM or SIGINT: requests in flight are finished."),
    "sweep.failed": ("warning", "A cluster could not be swept; it is tried again at the next interval."),
    "sweep.found": (
        "warning",
        "A sweep found something that the registry does not allow; see `authbackend enforcement sweeps`.",
    ),
}
"""Event: (level, meaning). A test holds them to the code."""
