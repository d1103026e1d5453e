"""Our own modules for models whose blocks have the common shape, once the zoo has shown what they are."""
