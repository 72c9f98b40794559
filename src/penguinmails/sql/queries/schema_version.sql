select max(version) from penguinmails.schema_version
