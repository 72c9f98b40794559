-- What became of the account's mails of a day, from the sums: its letters, and the campaigns that it started that day.
select coalesce(sum(k.deliveries) filter (where k.state = 'sent'), 0)::bigint,
       coalesce(sum(k.deliveries) filter (where k.state = 'bounced'), 0)::bigint,
       coalesce(sum(k.deliveries) filter (where k.state = 'complained'), 0)::bigint
  from penguinmails.campaigns c
  join penguinmails.campaign_counts k on k.campaign_id = c.id
 where coalesce(c.account, 'default') = %(account)s and c.started_at >= %(begin)s and c.started_at < %(end)s
