-- migrate:up

-- The number of an authority's latest list outlives its row: hosts of brokers refuse a list with a lower number, so numbers
-- continue after a list was deleted, or an authority was added again under another name.
create table crl_highest (
  issuer text primary key, -- subject of the authority, RFC 4514
  number numeric(48) not null,
  digest bytea not null -- SHA-256 of the list
);
insert into crl_highest (issuer, number, digest)
select a.subject, c.number, sha256(c.der) from crl c join authority a on a.name = c.authority;

create or replace function crl_check() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  named text;
  highest record;
begin
  select subject into named from public.authority where name = new.authority;
  if named is null then
    return new; -- the foreign key says it
  end if;
  select number, digest into highest from public.crl_highest where issuer = named for update;
  if new.number < highest.number then
    perform public.refuse(format('revocation list of authority %L: number %s is older than number %s, which its lists have reached', new.authority, new.number, highest.number));
  elsif new.number = highest.number and sha256(new.der) <> highest.digest then
    perform public.refuse(format('revocation list of authority %L: there is another list with number %s', new.authority, new.number));
  end if;
  insert into public.crl_highest (issuer, number, digest) values (named, new.number, sha256(new.der))
  on conflict (issuer) do update set number = excluded.number, digest = excluded.digest;
  return new;
end $$;
revoke execute on function crl_check() from public;
drop trigger crl_check on crl;
create trigger crl_check before insert or update on crl for each row execute function crl_check();
alter table crl enable always trigger crl_check;

-- migrate:down
