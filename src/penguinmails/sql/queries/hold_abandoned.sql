-- Intents of jobs that will not run again (cancelled, or failed by a timeout): nobody else would find them.
-- Only campaigns that have intents are looked at; campaign_counts knows which.
update penguinmails.deliveries d
   set state = 'held', ended_at = clock_timestamp(), reason = 'its job has ended, and the attempt has no outcome: the mail may have been sent or not'
 where d.campaign_id = any(array(select t.campaign_id from penguinmails.campaign_totals t where t.state = 'sending' and t.deliveries > 0))
   and d.state = 'sending'
   and not exists (select from {pmqd}.jobs j where j.id = d.job_id and j.status not in ('completed', 'failed', 'cancelled'))
