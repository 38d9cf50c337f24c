from setuptools import find_namespace_packages, find_packages, setup

# The folders beside the package are installed as subpackages of it: `vidgen` is the only name at the top
# level, so a user's own folder `experiments` hides none of it. In a checkout, vidgen/experiments and
# vidgen/pallas_kernels are links to them.
BESIDE = ("experiments", "pallas_kernels")
linked = [f"vidgen.{name}*" for name in BESIDE]
packages = find_packages(include=["vidgen", "vidgen.*"], exclude=linked)
for name in BESIDE:
    # Folders of weights too.
    found = find_namespace_packages(include=[name, f"{name}.*"], exclude=["*.__pycache__"])
    packages += [f"vidgen.{package}" for package in found]

setup(packages=packages, package_dir={f"vidgen.{name}": name for name in BESIDE})
