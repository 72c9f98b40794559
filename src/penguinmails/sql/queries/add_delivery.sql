-- The delivery of a job that no campaign.process has made: a producer's own.
insert into penguinmails.deliveries (id, campaign_id, recipient_id, job_id, email, account)
values (%(id)s, %(campaign_id)s, %(recipient_id)s, %(job_id)s, %(email)s, %(account)s)
on conflict (campaign_id, recipient_id) do nothing
