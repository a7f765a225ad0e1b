"""Programs that use petalfl as an app would."""
