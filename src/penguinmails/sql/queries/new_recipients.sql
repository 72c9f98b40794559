select r.recipient_id, r.email, r.name, r.variables, s.reason
  from penguinmails.recipients r
  left join penguinmails.suppressions s on s.address = penguinmails.address_key(r.email)
 where r.campaign_id = %(id)s
   and not exists (select from penguinmails.deliveries d where d.campaign_id = r.campaign_id and d.recipient_id = r.recipient_id)
