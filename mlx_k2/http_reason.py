"""The reason of a failed HTTP request, with the setting of the environment that causes it. Knows no server."""

import os
from pathlib import Path

from mlx_k2.package_install import install_command

_CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
_PROXY_VARIABLES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")


def http_reason(error: BaseException) -> str:
    """Return the reason of a failed request: the error's first line, and the proxy or certificate setting behind it.

    A proxy's address is not shown, because it can hold a password.
    """
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if isinstance(error, OSError):  # as raised where the file with the certificates cannot be opened
        for name in _CERTIFICATE_VARIABLES:
            if (path := os.environ.get(name)) and not Path(path).exists():
                return f"{name} names {path}, which does not exist: correct {name}, or unset it"
    if "CERTIFICATE_VERIFY_FAILED" in first_line:
        return f"{first_line}: if a proxy here replaces certificates, set SSL_CERT_FILE to the file of its certificates"
    proxies = [name for name in os.environ if name.upper() in _PROXY_VARIABLES]
    if isinstance(error, ImportError) and "socks" in first_line.lower():
        proxy = next((name for name in proxies if os.environ[name].startswith("socks")), "the system's proxy setting")
        install = install_command("socksio")
        return f"{proxy} is a SOCKS proxy, which needs a package: run `{install}`, or unset {proxy}"
    return f"{first_line} (through the proxy of {' and '.join(proxies)})" if proxies else first_line
