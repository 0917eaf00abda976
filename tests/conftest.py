"One thread, no window, and the same examples every time. `--hypothesis-profile search` looks for new ones."
import os
os.environ.setdefault('OMP_NUM_THREADS', '1') # torch's threads spin; before torch is imported
os.environ.setdefault('MPLBACKEND', 'Agg')

from hypothesis import HealthCheck, settings

slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile('house', max_examples=50, deadline=None, derandomize=True, suppress_health_check=slow)
settings.register_profile('search', max_examples=300, deadline=None, suppress_health_check=slow)
settings.load_profile('house')
