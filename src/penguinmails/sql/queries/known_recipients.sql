select recipient_id from penguinmails.recipients where campaign_id = %(id)s
