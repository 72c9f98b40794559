-- Every change of a delivery's state, written down by a trigger in the same transaction: what the proof compares the outcome with.
create schema penguinmails_proof;

create table penguinmails_proof.steps (
  seq          bigint generated always as identity,
  delivery_id  uuid not null,
  job_id       uuid,
  old_state    text not null,
  new_state    text not null,
  token        uuid,
  worker_id    text
);

create function penguinmails_proof.note() returns trigger
  language plpgsql
as $$
begin
  insert into penguinmails_proof.steps (delivery_id, job_id, old_state, new_state, token, worker_id)
  values (new.id, new.job_id, old.state, new.state, new.attempt_token, new.worker_id);
  return null;
end
$$;

create trigger proof_note after update on penguinmails.deliveries for each row execute function penguinmails_proof.note();
