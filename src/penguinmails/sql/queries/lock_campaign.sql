select c.template, c.priority, c.account, (select count(*) from penguinmails.recipients r where r.campaign_id = c.id)
  from penguinmails.campaigns c where c.id = %(id)s for no key update
