-- What warming up needs beside ramps and days.

-- New with every start: the plans that an earlier start has enqueued do nothing any more.
alter table {schema}.warmup_ramps add column generation uuid not null default gen_random_uuid();
comment on column {schema}.warmup_ramps.state is
  'ramping: raised by the last decision, or new; holding: held or lowered by it; finished: at its ceiling, which goes out every day; paused: stopped by a person.';
comment on column {schema}.warmup_days.sent is
  'With bounced and complained: of the day''s letters and of the campaigns that the account started that day; written with the decision.';

-- What happened to a letter of the seed network, once each.
create table {schema}.warmup_notes (
  account     text not null,
  message_id  text not null check (message_id <> ''),
  step        text not null check (step in ('received', 'answered', 'opened', 'replied', 'moved', 'flagged')),
  day         date not null,  -- in the time zone of the ramp
  noted_at    timestamptz not null default now(),
  primary key (account, message_id, step)
);
comment on column {schema}.warmup_notes.step is
  'received: a seed mailbox wrote to the account; answered: the account answers that; the others are what a seed mailbox did with a letter of the account.';
create index warmup_notes_day on {schema}.warmup_notes (account, day);

grant select, insert, update on {schema}.warmup_notes to {daemon_role};
grant all on {schema}.warmup_notes to {admin_role};
