copy penguinmails.recipients (campaign_id, recipient_id, email, name, variables) from stdin
