select state, deliveries from penguinmails.campaign_totals where campaign_id = %(id)s
