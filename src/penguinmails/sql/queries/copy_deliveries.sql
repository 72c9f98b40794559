copy penguinmails.deliveries (id, campaign_id, recipient_id, email, job_id, state, reason, ended_at, account) from stdin
