select id, campaign_id, email, state, message_id from penguinmails.deliveries where id = any(%(ids)s)
