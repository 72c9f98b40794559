-- Sessions of workers whose process was stopped between two messages of one transaction: "active" for the server, which therefore never
-- applies idle_in_transaction_session_timeout, and their locks would be held for as long as that process stands still. The ending is in
-- the select list: of conditions the planner would try the cheapest first.
select pid, extract(epoch from clock_timestamp() - state_change)::float8, pg_terminate_backend(pid)
from pg_stat_activity
where datname = current_database() and usename = current_user and application_name = 'pmqd:worker'
  and wait_event = 'ClientRead' and state <> 'idle'
  and state_change < clock_timestamp() - make_interval(secs => %(seconds)s)
