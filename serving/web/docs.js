// Shows the OpenAPI description of this server, in swagger-ui.
SwaggerUIBundle({ url: "/openapi.json", dom_id: "#interface" });
