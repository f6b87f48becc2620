"""
The reference that RabbitMQ's users start from: four Django views that answer ``allow``, for gunicorn.

They do the same work as the example that comes with RabbitMQ (GET, parameters from the query, no database, no
middleware), and were written for this benchmark.
"""

from __future__ import annotations

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path

settings.configure(
    ALLOWED_HOSTS=["*"], DEBUG=False, ROOT_URLCONF=__name__, MIDDLEWARE=[], SECRET_KEY="-" * 50, USE_I18N=False
)


def user(request: HttpRequest) -> HttpResponse:
    """Allow a login."""
    request.GET.get("username"), request.GET.get("password")
    return HttpResponse("allow")


def vhost(request: HttpRequest) -> HttpResponse:
    """Allow a virtual host."""
    request.GET.get("username"), request.GET.get("vhost"), request.GET.get("ip")
    return HttpResponse("allow")


def resource(request: HttpRequest) -> HttpResponse:
    """Allow a queue or an exchange."""
    [request.GET.get(name) for name in ("username", "vhost", "resource", "name", "permission")]
    return HttpResponse("allow")


def topic(request: HttpRequest) -> HttpResponse:
    """Allow a topic."""
    [request.GET.get(name) for name in ("username", "vhost", "resource", "name", "permission", "routing_key")]
    return HttpResponse("allow")


urlpatterns = [path(f"auth/{view.__name__}", view) for view in (user, vhost, resource, topic)]
application = get_wsgi_application()
