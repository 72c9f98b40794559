-- Three roles without login, as pmqd has them: to be granted to the login roles of producers, of the daemon and of people, beside pmqd's own.
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
revoke all on all functions in schema {schema} from public;

grant usage on schema {schema} to {enqueue_role}, {daemon_role}, {admin_role};

-- Producers: a campaign and its list, and how it goes. They see no address of anybody else's campaign.
grant insert on {schema}.campaigns, {schema}.recipients to {enqueue_role};
grant select (campaign_id, recipient_id) on {schema}.recipients to {enqueue_role};
grant select on {schema}.campaigns, {schema}.campaign_counts, {schema}.campaign_totals, {schema}.schema_version to {enqueue_role};

-- The daemon: what its handlers read and write.
grant select, insert, update on all tables in schema {schema} to {daemon_role};
revoke insert, update on {schema}.schema_version, {schema}.campaign_totals from {daemon_role};
grant execute on all functions in schema {schema} to {daemon_role};

-- People: everything.
grant all on all tables in schema {schema} to {admin_role};
grant all on all functions in schema {schema} to {admin_role};
