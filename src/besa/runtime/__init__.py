"""Running packed models without unpacking them: sparse linears, loading, generating text, measuring speed."""
