-- migrate:up

-- SHA-256 of the public key (SubjectPublicKeyInfo, DER), so that a compromised key gets no other certificate. Null: put on
-- record before this column.
alter table certificate add column key_fingerprint text;
create index certificate_compromised_key on certificate (key_fingerprint) where state = 'revoked' and reason = 'keyCompromise';

-- migrate:down
