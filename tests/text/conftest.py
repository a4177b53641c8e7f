from hypothesis import settings

# Each test has pytest's deadline; one for each example would fail on a busy machine.
settings.register_profile("no deadline for an example", deadline=None)
settings.load_profile("no deadline for an example")
