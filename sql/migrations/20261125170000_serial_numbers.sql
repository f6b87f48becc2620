-- migrate:up

-- Serial numbers that RFC 5280 4.1.2.2 forbids: zero, negative ones, and ones of more than 20 octets. Authorities have
-- issued such certificates and RabbitMQ accepts them: they can be on record, so that they can be revoked.
create or replace function certificate_serial_fault(serial text) returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp as $$
  select case
    when serial is null or serial !~ '^-?[0-9a-f]+$' or length(ltrim(serial, '-')) > 256 then 'it is written as 1 to 256 lower-case hexadecimal digits without separators, after a minus sign if it is negative'
    when serial ~ '^(-0|0.)' then 'it is written without leading zeros'
  end
$$;

-- migrate:down
