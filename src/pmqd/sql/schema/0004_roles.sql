-- Three roles without login, to be granted to the login roles of producers, of the daemon and of people. Functions are open to everybody
-- unless that is taken back, so each later file that makes one repeats the last lines here.
do $do$
declare
  wanted text;
begin
  foreach wanted in array array[{enqueue_name}, {daemon_name}, {admin_name}] loop
    begin
      if not exists (select from pg_roles where rolname = wanted) then
        execute format('create role %I nologin', wanted);
      end if;
    exception
      when duplicate_object or unique_violation then null;  -- made at the same moment for another database of this server
      when insufficient_privilege then
        raise exception 'role % is missing and % may not create roles', wanted, current_user
          using errcode = 'insufficient_privilege', hint = format('as an administrator: create role %I nologin', wanted);
    end;
  end loop;
end
$do$;

revoke all on schema {schema} from public;
revoke all on all tables in schema {schema} from public;
revoke all on all sequences in schema {schema} from public;
revoke all on all functions in schema {schema} from public;

grant usage on schema {schema} to {enqueue_role}, {daemon_role}, {admin_role};

-- Producers: one function and nothing else.
grant execute on function {schema}.enqueue to {enqueue_role};

-- The daemon.
grant select, insert, update on {schema}.jobs, {schema}.job_queues to {daemon_role};
grant select, insert on {schema}.job_logs to {daemon_role};
grant select, delete on {schema}.jobs_default, {schema}.job_logs_default to {daemon_role};
grant select, insert, update, delete on {schema}.claims, {schema}.instances to {daemon_role};
grant select, update on {schema}.leader, {schema}.ticker, {schema}.retention to {daemon_role};
grant select on {schema}.schema_version, {schema}.partitions to {daemon_role};
grant usage on sequence {schema}.job_logs_id to {daemon_role};
grant execute on all functions in schema {schema} to {daemon_role};

-- People who operate it: everything inside the schema, by whatever client.
grant all on all tables in schema {schema} to {admin_role};
grant all on all sequences in schema {schema} to {admin_role};
grant all on all functions in schema {schema} to {admin_role};
