"""The first edition of streets: small, quick, and a target that differs mostly in colour and light."""
