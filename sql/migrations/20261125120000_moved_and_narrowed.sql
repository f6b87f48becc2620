-- migrate:up

-- A change of a type may give a device client ids that others use, and also take something from it: two tasks for one parent.
drop index enforcement_child;
create unique index enforcement_child on enforcement (parent, name, (details ? 'moved')) where parent is not null;

-- migrate:down
